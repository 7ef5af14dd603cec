package main

import (
	"strings"
	"testing"

	"github.com/slipway-net/slipway/internal/api"
)

// A person is told what the kinds of user namespaces mean, and no words of the API.
func TestStatusWords(t *testing.T) {
	for mapping, want := range map[string]string{
		"none": "isolated     net; users and groups are the host's\n", "ranges": "root inside is you, other users and groups are those of /etc/subuid",
		"single": "there is no other user", "identity": "in a user namespace", "\x1b": "user namespace: ?",
	} {
		var b strings.Builder
		s := api.Status{Engine: api.Engine{UserNamespace: mapping, Isolate: []string{"net"}}, Ping: api.PingStatus{Mode: "ping socket", GroupRange: "0 65535"}}
		if err := printStatus(&b, s); err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{want, "ping socket; inside without root for groups 0 to 65535\n"} {
			if !strings.Contains(b.String(), want) {
				t.Errorf("%q: no %q in\n%s", mapping, want, b.String())
			}
		}
	}
}
