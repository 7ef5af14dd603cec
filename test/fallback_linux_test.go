package test

import (
	"encoding/json"
	"testing"
)

// healthDoc is more of `slipway status --json`.
type healthDoc struct {
	statusDoc
	Path struct {
		Configured string `json:"configured"`
		TCP        string `json:"tcp"`
		UDP        string `json:"udp"`
		Ping       string `json:"ping"`
		Why        string `json:"why"`
	} `json:"path"`
	Memory struct {
		Goroutines int `json:"goroutines"`
	} `json:"memory"`
	Flows []struct {
		Proto string `json:"proto"`
		Live  int    `json:"live"`
		Ended int    `json:"ended"`
	} `json:"flows"`
}

func readHealth(t testing.TB, e *engine) (h healthDoc) {
	t.Helper()
	r := e.call(t, "status", e.name, "--json")
	if err := json.Unmarshal([]byte(r.stdout), &h); err != nil {
		t.Fatalf("status --json: %v: %s%s", err, r.stdout, r.stderr)
	}
	return h
}
