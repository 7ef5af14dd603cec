package test

import (
	"encoding/json"
	"net/netip"
	"testing"
)

// What the tests read of `slipway status --json` and `slipway flows --json`; the
// whole is in docs/openapi.yaml. Declared here again: a test that shared the types
// would not notice when a name changes under other programs.
type statusDoc struct {
	Counters map[string]map[string]int64 `json:"counters"`
	Warnings []string                    `json:"warnings"`
}

type flowDoc struct {
	Proto    string         `json:"proto"`
	Guest    netip.AddrPort `json:"guest"`
	Target   netip.AddrPort `json:"target"`
	Path     string         `json:"path"`
	Decision string         `json:"decision"`
	Reason   string         `json:"reason"`
}

func readStatus(t testing.TB, e *engine) (s statusDoc) {
	t.Helper()
	r := e.call(t, "status", e.name, "--json")
	if err := json.Unmarshal([]byte(r.stdout), &s); err != nil {
		t.Fatalf("status --json: %v: %s%s", err, r.stdout, r.stderr)
	}
	return s
}

// counters returns all counters of status as PART.NAME.
func counters(t testing.TB, e *engine) map[string]int64 {
	t.Helper()
	all := make(map[string]int64)
	for part, names := range readStatus(t, e).Counters {
		for name, n := range names {
			all[part+"."+name] = n
		}
	}
	return all
}

func readFlows(t testing.TB, e *engine) []flowDoc {
	t.Helper()
	r := e.call(t, "flows", e.name, "--json")
	var list struct {
		Flows []flowDoc `json:"flows"`
	}
	if err := json.Unmarshal([]byte(r.stdout), &list); err != nil {
		t.Errorf("flows --json: %v: %s%s", err, r.stdout, r.stderr)
	}
	return list.Flows
}
