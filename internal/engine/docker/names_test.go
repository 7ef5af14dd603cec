package docker

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"github.com/slipway-net/slipway/internal/flow"
)

func newNames(t *testing.T, socket string) *Names {
	n := NewNames(socket, slog.New(slog.DiscardHandler))
	t.Cleanup(n.Close)
	return n
}

// fourContainers have an address of each family, one network's twice, and bad names.
const fourContainers = `[
	{"Id": "1", "Names": ["/other/alias", "/web"], "Ports": [{"IP": "0.0.0.0", "PrivatePort": 80, "PublicPort": 8080, "Type": "tcp"}],
	 "NetworkSettings": {"Networks": {"bridge": {"IPAddress": "172.17.0.2"}, "lan": {"IPAddress": "10.0.0.9", "GlobalIPv6Address": "fd00::2"}}}},
	{"Id": "2", "Names": ["/db_1.x-y"], "NetworkSettings": {"Networks": {"vlan": {"IPAddress": "10.0.0.9"}, "host": {"IPAddress": ""}}}},
	{"Id": "3", "Names": ["/\u001b[2J"], "NetworkSettings": {"Networks": {"bridge": {"IPAddress": "172.17.0.3"}}}},
	{"Id": "4", "Names": null, "NetworkSettings": {"Networks": {"bridge": {"IPAddress": "172.17.0.4"}}}}
]`

// listed asks until the engine has answered in time, as it may not on a busy machine.
func listed(t *testing.T, n *Names) (c Containers) {
	for range 20 {
		if c = n.List(t.Context()); !n.stuck {
			break
		}
		n.asked = time.Time{}
	}
	return c
}

func TestNames(t *testing.T) {
	e := newEngine(t)
	e.says("/containers/json", answer{body: fourContainers})
	e.start(t)
	n := newNames(t, e.socket)
	c := listed(t, n)
	for address, want := range map[string]string{
		"172.17.0.2": "web", "fd00::2": "web", "10.0.0.9": "", "172.17.0.3": "", "172.17.0.4": "", "192.0.2.1": "",
	} {
		if got := c.Behind(netip.MustParseAddr(address)); got != want {
			t.Errorf("%s is called %q, want %q", address, got, want)
		}
	}
	s := flow.PortSpec{Proto: flow.TCP, Host: netip.MustParseAddrPort("0.0.0.0:8080")}
	if got := c.Publishes(s); got != "web" {
		t.Errorf("%v is published by %q", s, got)
	}
	if s.Proto = flow.UDP; c.Publishes(s) != "" {
		t.Errorf("%v is published by %q", s, c.Publishes(s))
	}
	asked := e.count("/containers/json")
	n.asked = time.Now()
	if n.List(t.Context()); e.count("/containers/json") != asked {
		t.Error("asked again at once")
	}
	// A name may change.
	e.says("/containers/json", answer{body: `[{"Names": ["/renamed"], "NetworkSettings": {"Networks": {"a": {"IPAddress": "172.17.0.2"}}}}]`})
	n.asked = n.asked.Add(-namesAge)
	if got := listed(t, n).Behind(netip.MustParseAddr("172.17.0.2")); got != "renamed" {
		t.Errorf("is called %q after it was renamed", got)
	}
}

// An engine that does not answer is waited for once, and what it said before holds on.
func TestNamesStalled(t *testing.T) {
	e := newEngine(t)
	e.says("/containers/json", answer{body: fourContainers})
	e.start(t)
	n := newNames(t, e.socket)
	listed(t, n)
	e.stop()
	n.asked = n.asked.Add(-namesAge)
	if n.List(t.Context()); n.stuck {
		t.Error("one that has ended, and may start again, is taken for one that does not answer")
	}
	ln, err := net.Listen("unix", filepath.Join(filepath.Dir(e.socket), "stalled"))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	n.api = newClient(ln.Addr().String())
	n.asked = n.asked.Add(-namesAge)

	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if n.List(gone); n.stuck {
		t.Error("somebody who does not want to know any more says something about the engine")
	}
	from := time.Now()
	for range 100 {
		if got := n.List(t.Context()).Behind(netip.MustParseAddr("172.17.0.2")); got != "web" {
			t.Fatalf("is called %q while the engine says nothing", got)
		}
	}
	if d := time.Since(from); d < namesLimit || d > 50*namesLimit {
		t.Errorf("a hundred times took %v, want one time-out of %v", d, namesLimit)
	}
	n.asked = n.asked.Add(-namesRetry)
	from = time.Now()
	if n.List(t.Context()); time.Since(from) < namesLimit {
		t.Error("not asked again after some time")
	}
}
