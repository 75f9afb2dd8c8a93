# make run     builds everything and starts it at http://127.0.0.1:8080
# make test    checks and tests everything
# The rest is below.

PREFIX   = /usr/local
UNITDIR  = $(if $(DESTDIR),/lib/systemd/system,/etc/systemd/system)
FUZZTIME = 1m
# The toolchain that go.mod names comes through the module proxy where the
# installed Go is older.
export GOTOOLCHAIN = auto
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null)
STAMP    = $(if $(VERSION),-ldflags '-X main.stamped=$(VERSION)',-buildvcs=false)

.PHONY: build web audit-web run test test-faults bench fuzz install clean

# The server, one static binary. Needs Go alone; without npm it has no recorder.
build: web
	CGO_ENABLED=0 go build -trimpath $(STAMP) -o session-replay .

# rrweb's built files, which the binary carries.
web:
	@scripts/web

# Compares them with the packages that web/package-lock.json names by hash.
audit-web: web
	@scripts/web audit

# With a private PostgreSQL in .postgres/ if no database is configured.
run: build
	@scripts/run

# Everything: against a real PostgreSQL, which the tests start, and in a real
# Chromium. Neither is optional.
test: build
	@unformatted=$$(gofmt -l *.go); test -z "$$unformatted" || { echo "not gofmt's form:" $$unformatted; exit 1; }
	go vet ./...
	go vet -tags faults,bench ./...
	go test -race -shuffle=on -parallel 4 -timeout 8m ./...
	@scripts/chromium
	node --test --test-concurrency=2 --test-reporter=spec web/test/*.test.mjs

# The fault tests with large numbers; ends with how many events were acked,
# stored, lost and doubled. Without -race: the server is a process of its own,
# and only the clients would become slower.
test-faults: web
	go test -tags faults -run '^TestFault' -count=1 -timeout 20m -v .

# Measures the server on this machine; prints a table, writes bench.json.
bench: web
	go test -tags bench -run TestBench -count 1 -timeout 15m -v .

# Each fuzz target for FUZZTIME.
fuzz:
	@set -e; for target in $$(go test -list '^Fuzz' . | grep ^Fuzz); do \
		echo "$$target"; go test -run '^$$' -fuzz "^$$target$$" -fuzztime $(FUZZTIME) .; \
	done

# The binary, the unit, and settings to edit; settings that are there stay.
install:
	test -x session-replay || $(MAKE) build
	install -D -m 0755 session-replay $(DESTDIR)$(PREFIX)/bin/session-replay
	install -d $(DESTDIR)$(UNITDIR)
	sed 's|/usr/local/|$(PREFIX)/|' session-replay.service >$(DESTDIR)$(UNITDIR)/session-replay.service
	install -d -m 0750 $(DESTDIR)/etc/session-replay
	test -e $(DESTDIR)/etc/session-replay/env || install -m 0640 .env.example $(DESTDIR)/etc/session-replay/env

# What was built and fetched; .postgres/ and logs/ stay.
clean:
	rm -rf session-replay bench.json web/node_modules
	find web/dist -type f ! -name README.txt -delete
