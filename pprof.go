//go:build bench

package main

import (
	"net/http"
	_ "net/http/pprof" // of the default mux, which the server itself does not use
	"os"
)

// With the build tag bench, and only then, the server shows its profiles at the
// address in SR_PPROF.
func init() {
	if address := os.Getenv("SR_PPROF"); address != "" {
		go http.ListenAndServe(address, nil) // ends with the process
	}
}
