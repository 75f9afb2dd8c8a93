//go:build faults

package main

// fullFaults: see faults_quick_test.go.
const fullFaults = true
