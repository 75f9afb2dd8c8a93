package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"unicode/utf8"
)

func TestParseFrame(t *testing.T) {
	tests := []struct {
		name, msg string
		err       error
		typ, data string
		events    []string
		objects   bool
		seq       string
	}{
		{name: "batch", msg: `{"type":"events_batch","data":{"events":[{"type":2,"timestamp":5},{"a":1}],"seq":7}}`,
			typ: "events_batch", data: `{"events":[{"type":2,"timestamp":5},{"a":1}],"seq":7}`,
			events: []string{`{"type":2,"timestamp":5}`, `{"a":1}`}, objects: true, seq: "7"},
		{name: "data first, white space, other members",
			msg: " {\n\"x\" : [1], \"data\" :\t{ \"events\" : [ { \"a\" : 1 } , {} ] } , \"type\" : \"t\" } ",
			typ: "t", data: `{ "events" : [ { "a" : 1 } , {} ] }`, events: []string{`{ "a" : 1 }`, `{}`}, objects: true},
		{name: "the last of two keys counts",
			msg: `{"type":"a","data":{"events":[{"a":1}],"seq":1},"data":{"seq":2},"type":"b"}`,
			typ: "b", data: `{"seq":2}`, seq: "2"},
		{name: "of two lists of events too", msg: `{"type":"a","data":{"events":[{"a":1}],"events":[{"b":2},{"c":3}]}}`,
			typ: "a", data: `{"events":[{"a":1}],"events":[{"b":2},{"c":3}]}`, events: []string{`{"b":2}`, `{"c":3}`},
			objects: true},
		{name: "also when it is no list", msg: `{"type":"a","data":{"events":[{"a":1}],"events":5}}`,
			typ: "a", data: `{"events":[{"a":1}],"events":5}`},
		{name: "escaped keys", msg: `{"\u0074ype":"a","d\u0061ta":{"s\u0065q":3}}`, typ: "a", data: `{"s\u0065q":3}`,
			seq: "3"},
		{name: "no data", msg: `{"type":"heartbeat"}`, typ: "heartbeat"},
		{name: "events not an array", msg: `{"type":"a","data":{"events":{}}}`, typ: "a", data: `{"events":{}}`},
		{name: "an event not an object", msg: `{"type":"a","data":{"events":[{},1]}}`, typ: "a", data: `{"events":[{},1]}`,
			events: []string{`{}`}},
		{name: "empty array", msg: `{"type":"a","data":{"events":[]}}`, typ: "a", data: `{"events":[]}`, objects: true},
		{name: "no type", msg: `{"data":{}}`, err: errType},
		{name: "type a number", msg: `{"type":1}`, err: errType},
		{name: "array", msg: `[]`, err: errSyntax},
		{name: "empty", msg: ``, err: errSyntax},
		{name: "two values", msg: `{"type":"a"}{}`, err: errSyntax},
		{name: "byte order mark", msg: "\ufeff{\"type\":\"a\"}", err: errSyntax},
		{name: "invalid UTF-8", msg: "{\"type\":\"\xff\"}", err: errUTF8},
		{name: "too deep", msg: `{"type":"a","data":` + strings.Repeat("[", 10000) + strings.Repeat("]", 10000) + `}`,
			err: errSyntax},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f, err := parseFrame([]byte(tt.msg))
			if err != tt.err {
				t.Fatalf("got error %v, want %v", err, tt.err)
			}
			if f.typ != tt.typ || string(f.data) != tt.data || f.objects != tt.objects || string(f.seq) != tt.seq {
				t.Errorf("got type %q data %q objects %v seq %q", f.typ, f.data, f.objects, f.seq)
			}
			if len(f.events) != len(tt.events) {
				t.Fatalf("got %d events, want %d", len(f.events), len(tt.events))
			}
			for i, e := range f.events {
				if got := string(f.msg[e.start:e.end]); got != tt.events[i] {
					t.Errorf("event %d: got %q, want %q", i, got, tt.events[i])
				}
			}
		})
	}
}

func TestEventTypeAndTime(t *testing.T) {
	tests := []struct {
		event string
		kind  int32
		time  int64
	}{
		{`{"type":2,"timestamp":1700000000123}`, 2, 1700000000123},
		{`{"data":{"type":9,"timestamp":9},"type":3,"timestamp":1700000000123.9}`, 3, 1700000000123},
		{`{"type":"2","timestamp":"5"}`, -1, 0},
		{`{"type":1e400,"timestamp":1e400}`, -1, 0},
		{`{"timestamp":12345678901234567890}`, -1, 0},
		{`{"timestamp":-5}`, -1, -5},
		{`{}`, -1, 0},
	}
	for _, tt := range tests {
		events, err := splitEvents([]byte("[" + tt.event + "]"))
		if err != nil || len(events) != 1 {
			t.Fatalf("%s: got %d events, error %v", tt.event, len(events), err)
		}
		if e := events[0]; e.kind != tt.kind || e.time != tt.time {
			t.Errorf("%s: got type %d, time %d, want %d, %d", tt.event, e.kind, e.time, tt.kind, tt.time)
		}
	}
}

var jsonSeeds = []string{
	`{"type":"a","data":{"events":[{"a":"\u0000\ud800\"\\"},{"b":1e400}],"seq":1}}`,
	`[{"type":2,"timestamp":1},{"type":3}]`, `{"type":"a"}x`, `{"type":"a",}`, `{"a":01}`, `{"a":-}`, `{"a":1.}`,
	`{"a":1e}`,
	`{"a":"\x"}`, `{"a":"\u12g4"}`, "{\"a\":\"\x01\"}", `{"a":tru}`, `{"a" 1}`, `{"a":1 "b"}`, `[[[[`, `{"a":-0.0e+1}`,
	`{`, `"`, `[1,]`, `{"a":"\u00`,
}

func FuzzParseFrame(f *testing.F) {
	for _, seed := range jsonSeeds {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, msg []byte) {
		got, err := parseFrame(msg)
		trimmed := bytes.TrimLeft(msg, " \t\r\n")
		object := utf8.Valid(msg) && len(trimmed) > 0 && trimmed[0] == '{' && json.Valid(msg)
		if object == (err == errSyntax || err == errUTF8) {
			t.Fatalf("json.Valid says %v of %q, parseFrame: %v", object, msg, err)
		}
		for _, e := range got.events {
			if !json.Valid(got.msg[e.start:e.end]) {
				t.Fatalf("%q: event %q is not valid", msg, got.msg[e.start:e.end])
			}
		}
	})
}

func FuzzSplitEvents(f *testing.F) {
	for _, seed := range jsonSeeds {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, chunk []byte) {
		events, err := splitEvents(chunk)
		var want []json.RawMessage
		if err != nil || json.Unmarshal(chunk, &want) != nil {
			return
		}
		if len(events) != len(want) {
			t.Fatalf("got %d events, want %d", len(events), len(want))
		}
		for i, e := range events {
			if !bytes.Equal(chunk[e.start:e.end], want[i]) {
				t.Fatalf("event %d: got %q, want %q", i, chunk[e.start:e.end], want[i])
			}
		}
	})
}
