package main

import (
	"os"

	"github.com/slipway-net/slipway/internal/dockerproxy"
	"github.com/slipway-net/slipway/internal/doctor"
	"github.com/slipway-net/slipway/internal/nsagent"
)

// runAgent is main for the processes that run inside namespaces: a guest's agent and the
// doctor's trial, which we start, and a proxy for each port, which dockerd starts.
func runAgent() {
	if nsagent.IsAgent() {
		nsagent.Main()
	}
	if doctor.IsTrial() {
		doctor.Trial()
	}
	if dockerproxy.IsProxy(os.Args[0]) {
		os.Exit(dockerproxy.Main(os.Args, version))
	}
}
