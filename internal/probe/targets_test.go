package probe

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var addrs = cmp.Comparer(func(a, b netip.Addr) bool { return a == b })
var addrPorts = cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })

func TestTargetsThereAndBack(t *testing.T) {
	want := Targets{
		TCP4: netip.MustParseAddrPort("192.0.2.1:7"), TCP6: netip.MustParseAddrPort("[2001:db8::1]:7"),
		UDP4: netip.MustParseAddrPort("192.0.2.1:8"), Ping4: netip.MustParseAddr("192.0.2.1"),
		HostTCP: 4711, HostUDP: 65535, Names: []string{"www.example.org", "example.org"},
		Missing: map[string]string{"udp6": "no socket: why=because", "ping6": "the host may not ping"},
	}
	var got Targets
	for _, arg := range want.Args() {
		if err := got.Set(arg); err != nil {
			t.Error(err)
		}
	}
	if diff := cmp.Diff(want, got, addrs, addrPorts); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string(nil), new(Targets).Args()); diff != "" {
		t.Errorf("zero Targets (-want +got):\n%s", diff)
	}
}

func TestTargetsSetRefuses(t *testing.T) {
	for _, arg := range []string{
		"", "tcp4", "tcp4=", "tcp5=192.0.2.1:7", "tcp4=192.0.2.1", "tcp4=192.0.2.1:0", "tcp4=[2001:db8::1]:7",
		"tcp6=192.0.2.1:7", "tcp6=[::ffff:192.0.2.1:7", "udp4=host:7", "udp4=192.0.2.1:65536", "ping4=2001:db8::1",
		"ping6=192.0.2.1", "ping4=192.0.2.1:7", "host-tcp=0", "host-tcp=65536", "host-udp=-1", "host-udp=x",
	} {
		var got Targets
		err := got.Set(arg)
		if err == nil {
			t.Errorf("Set(%q) = nil, %v", arg, got.Args())
		} else if strings.Contains(err.Error(), "\n") || !strings.HasPrefix(err.Error(), "target ") {
			t.Errorf("Set(%q) = %q", arg, err)
		}
		if len(got.Args()) != 0 {
			t.Errorf("Set(%q) left %v", arg, got.Args())
		}
	}
}
