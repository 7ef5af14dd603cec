package main

import (
	"github.com/slipway-net/slipway/internal/doctor"
	"github.com/slipway-net/slipway/internal/nsagent"
)

// runAgent is main for the processes that we start inside namespaces: a guest's agent,
// and the doctor's trial.
func runAgent() {
	if nsagent.IsAgent() {
		nsagent.Main()
	}
	if doctor.IsTrial() {
		doctor.Trial()
	}
}
