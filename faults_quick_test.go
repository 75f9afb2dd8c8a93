//go:build !faults

package main

// fullFaults: go test runs the fault tests with small numbers; with -tags faults
// (make test-faults) the same tests run with large ones.
const fullFaults = false
