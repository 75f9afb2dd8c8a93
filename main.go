// Command session-replay records browser sessions, shows them live and replays
// them.
package main

func main() {}
