package main

import "github.com/slipway-net/slipway/internal/nsagent"

// runAgent is main for the process that the daemon starts inside a guest's namespaces.
func runAgent() {
	if nsagent.IsAgent() {
		nsagent.Main()
	}
}
