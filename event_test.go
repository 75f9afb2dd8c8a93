package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"testing"
	"unicode/utf8"
)

func TestParseFrame(t *testing.T) {
	const two = `{"type":2,"timestamp":5},{"a":1}`
	for _, tt := range []struct {
		name, msg string
		want      any // an error, or type, data, seq, the events, and whether all of them are objects
	}{
		{"batch", `{"type":"events_batch","data":{"events":[` + two + `],"seq":7}}`,
			`events_batch {"events":[` + two + `],"seq":7} 7 [{"type":2,"timestamp":5} {"a":1}] true`},
		{"data first, white space, other members",
			" {\n\"x\" : [1], \"data\" :\t{ \"events\" : [ { \"a\" : 1 } , {} ] } , \"type\" : \"t\" } ",
			`t { "events" : [ { "a" : 1 } , {} ] }  [{ "a" : 1 } {}] true`},
		{"the last of two keys counts", `{"type":"a","data":{"events":[{"a":1}],"seq":1},"data":{"seq":2},"type":"b"}`,
			`b {"seq":2} 2 [] false`},
		{"of two lists of events too", `{"type":"a","data":{"events":[{"a":1}],"events":[{"b":2},{"c":3}]}}`,
			`a {"events":[{"a":1}],"events":[{"b":2},{"c":3}]}  [{"b":2} {"c":3}] true`},
		{"also when it is no list", `{"type":"a","data":{"events":[{"a":1}],"events":5}}`,
			`a {"events":[{"a":1}],"events":5}  [] false`},
		{"escaped keys", `{"\u0074ype":"a","d\u0061ta":{"s\u0065q":3}}`, `a {"s\u0065q":3} 3 [] false`},
		{"no data", `{"type":"heartbeat"}`, `heartbeat   [] false`},
		{"events not an array", `{"type":"a","data":{"events":{}}}`, `a {"events":{}}  [] false`},
		{"an event not an object", `{"type":"a","data":{"events":[{},1]}}`, `a {"events":[{},1]}  [{}] false`},
		{"empty array", `{"type":"a","data":{"events":[]}}`, `a {"events":[]}  [] true`},
		{"invalid UTF-8", "{\"type\":\"\xff\"}", errUTF8},
	} {
		f, err := parseFrame([]byte(tt.msg))
		got := any(err)
		if err == nil {
			events := []string{}
			for _, e := range f.events {
				events = append(events, string(f.msg[e.start:e.end]))
			}
			got = fmt.Sprintf("%s %s %s %s %v", f.typ, f.data, f.seq, events, f.objects)
		}
		if got != tt.want {
			t.Errorf("%s: got %v, want %v", tt.name, got, tt.want)
		}
	}
}

func TestEventTypeAndTime(t *testing.T) {
	tests := []struct {
		event string
		kind  int64
		time  int64
	}{
		{`{"type":2,"timestamp":1700000000123}`, 2, 1700000000123},
		{`{"data":{"type":9,"timestamp":9},"type":3,"timestamp":1700000000123.9}`, 3, 1700000000123},
		{`{"type":"2","timestamp":"5"}`, -1, 0},
		{`{"type":1e400,"timestamp":1e400}`, -1, 0},
		{`{"timestamp":12345678901234567890}`, -1, 0},
		{`{"timestamp":-5}`, -1, -5},
		{`{"type":4294967298}`, 1<<32 + 2, 0},
		{`{"type":3,"type":2,"timestamp":1,"timestamp":2}`, 2, 2},
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
			if e := chunk[e.start:e.end]; !bytes.Equal(e, want[i]) || e[0] != '{' || e[len(e)-1] != '}' {
				t.Fatalf("event %d: got %q, want the object %q", i, e, want[i])
			}
		}
	})
}
