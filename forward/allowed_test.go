package forward

import (
	"bytes"
	"errors"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/slipway-net/slipway/internal/flow"
)

func testPolicyConfig() PolicyConfig {
	return PolicyConfig{
		Gateway4: netip.MustParseAddr("192.168.65.1"), Host4: netip.MustParseAddr("192.168.65.2"),
		Gateway6: netip.MustParseAddr("fdc4:f303:9324::1"), Host6: netip.MustParseAddr("fdc4:f303:9324::2"),
		Subnets: []netip.Prefix{netip.MustParsePrefix("192.168.65.0/24"), netip.MustParsePrefix("fdc4:f303:9324::/64")},
	}
}

func TestAllowed(t *testing.T) {
	tests := []struct {
		target string
		want   flow.Answer // Connect: allowed
	}{
		{"198.51.100.7", flow.Connect},
		{"10.0.0.1", flow.Connect},
		{"192.168.64.255", flow.Connect},
		{"192.168.66.1", flow.Connect},
		{"100.64.0.1", flow.Connect},
		{"2001:db8::1", flow.Connect},
		{"fd00:ec2::253", flow.Connect},
		{"fdc4:f303:9324:1::1", flow.Connect},
		{"64:ff9b::198.51.100.7", flow.Connect},
		{"64:ff9b:1::198.51.100.7", flow.Connect},
		{"64:ff9b:1:c633:64:700::", flow.Connect}, // 198.51.100.7 in the /48 form
		{"2002:c633:6407::1", flow.Connect},
		{"::ffff:198.51.100.7", flow.Connect},

		{"0.0.0.0", flow.Unreachable},
		{"0.1.2.3", flow.Unreachable},
		{"127.0.0.1", flow.Unreachable},
		{"127.255.255.255", flow.Unreachable},
		{"169.254.169.254", flow.Unreachable},
		{"168.63.129.16", flow.Unreachable},
		{"240.0.0.1", flow.Unreachable},
		{"192.168.65.1", flow.Unreachable},
		{"192.168.65.2", flow.Unreachable}, // Route translates it before it asks
		{"192.168.65.77", flow.Unreachable},
		{"192.168.65.255", flow.Silence},
		{"224.0.0.1", flow.Silence},
		{"239.255.255.250", flow.Silence},
		{"255.255.255.255", flow.Silence},
		{"::", flow.Unreachable},
		{"::1", flow.Unreachable},
		{"::1%lo", flow.Unreachable},
		{"fe80::1", flow.Unreachable},
		{"fe80::1%eth0", flow.Unreachable},
		{"febf::1", flow.Unreachable},
		{"ff02::1", flow.Silence},
		{"fd00:ec2::254", flow.Unreachable},
		{"fdc4:f303:9324::99", flow.Unreachable},
		{"::ffff:127.0.0.1", flow.Unreachable},
		{"::ffff:0.0.0.0", flow.Unreachable},
		{"::ffff:192.168.65.1", flow.Unreachable},
		{"::ffff:224.0.0.1", flow.Silence},
		{"::127.0.0.1", flow.Unreachable},
		{"::ffff:0:127.0.0.1", flow.Unreachable},
		{"64:ff9b::127.0.0.1", flow.Unreachable},
		{"64:ff9b::", flow.Unreachable},
		{"64:ff9b::169.254.169.254", flow.Unreachable},
		{"64:ff9b::192.168.65.1", flow.Unreachable},
		{"64:ff9b:1::127.0.0.1", flow.Unreachable},
		{"64:ff9b:1:7f00:0:100::", flow.Unreachable},        // 127.0.0.1 in the /48 form
		{"64:ff9b:1:ab7f:0:1::", flow.Unreachable},          // /56
		{"64:ff9b:1:abcd:7f:0:100:0", flow.Unreachable},     // /64
		{"64:ff9b:1:abcd:a9:fea9:fe00:0", flow.Unreachable}, // 169.254.169.254 in the /64 form
		{"2002:7f00:1::1", flow.Unreachable},
	}
	p := NewPolicy(testPolicyConfig())
	for _, tt := range tests {
		err := p.Allowed(netip.MustParseAddr(tt.target))
		got := flow.Connect
		if denied := (*DeniedError)(nil); errors.As(err, &denied) {
			got = denied.Answer
		}
		if got != tt.want {
			t.Errorf("Allowed(%s) = %v (%v), want %v", tt.target, got, err, tt.want)
		}
	}
	if p.Allowed(netip.Addr{}) == nil {
		t.Error("Allowed(zero Addr) = nil")
	}
}

func TestDeniedVerdict(t *testing.T) {
	p := NewPolicy(testPolicyConfig())
	tests := []struct {
		target string
		want   flow.Verdict
	}{
		{"127.0.0.1:80", flow.Verdict{Answer: flow.Unreachable, ICMP: flow.ICMP{Type: 3, Code: 13}}},
		{"[::1]:80", flow.Verdict{Answer: flow.Unreachable, ICMP: flow.ICMP{Type: 1, Code: 1}}},
		{"[64:ff9b::127.0.0.1]:80", flow.Verdict{Answer: flow.Unreachable, ICMP: flow.ICMP{Type: 1, Code: 1}}},
		{"224.0.0.1:80", flow.Verdict{}},
		{"192.168.65.2:80", flow.Verdict{Answer: flow.Reset}},
		{"[fdc4:f303:9324::2]:80", flow.Verdict{Answer: flow.Reset}},
	}
	for _, tt := range tests {
		target := netip.MustParseAddrPort(tt.target)
		_, decision, err := p.Route(flow.Tuple{Proto: flow.TCP, Target: target})
		if err == nil || decision != flow.Denied {
			t.Errorf("Route(%s) = %v, %v; want an error", tt.target, decision, err)
			continue
		}
		if got := asDenied(err, target).Verdict(); got != tt.want {
			t.Errorf("Route(%s): verdict %+v, want %+v", tt.target, got, tt.want)
		}
	}
}

func TestRoute(t *testing.T) {
	cfg := testPolicyConfig()
	cfg.HostAccess.Ports = []PortRange{{8000, 8010}, {53, 53}}
	some := NewPolicy(cfg)
	none := NewPolicy(testPolicyConfig())
	cfg.HostAddresses = AsHostAccess
	strict := NewPolicy(cfg)
	own := netip.MustParseAddr("203.0.113.9")
	strict.own.list = func() ([]netip.Addr, error) { return []netip.Addr{own}, nil }
	tests := []struct {
		name   string
		p      *Policy
		proto  flow.Proto
		target string
		want   string // dials, joined; "" for denied
	}{
		{"plain", some, flow.TCP, "198.51.100.7:443", "198.51.100.7:443"},
		{"host4", some, flow.TCP, "192.168.65.2:8000", "127.0.0.1:8000 [::1]:8000"},
		{"host4_last", some, flow.UDP, "192.168.65.2:8010", "127.0.0.1:8010 [::1]:8010"},
		{"host4_beyond", some, flow.UDP, "192.168.65.2:8011", ""},
		{"host6", some, flow.TCP, "[fdc4:f303:9324::2]:53", "[::1]:53 127.0.0.1:53"},
		{"host_none", none, flow.TCP, "192.168.65.2:8000", ""},
		{"ping_some", some, flow.Ping, "192.168.65.2:0", "127.0.0.1:0 [::1]:0"},
		{"ping_none", none, flow.Ping, "192.168.65.2:0", ""},
		{"own_open", some, flow.TCP, "203.0.113.9:22", "203.0.113.9:22"},
		{"own_as_host_denied", strict, flow.TCP, "203.0.113.9:22", ""},
		{"own_as_host", strict, flow.TCP, "203.0.113.9:8001", "203.0.113.9:8001"},
		{"gateway", some, flow.TCP, "192.168.65.1:80", ""},
		{"mapped_loopback", some, flow.TCP, "[::ffff:127.0.0.1]:8000", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dials, _, err := tt.p.Route(flow.Tuple{Proto: tt.proto, Target: netip.MustParseAddrPort(tt.target)})
			var got []string
			for _, d := range dials {
				got = append(got, d.String())
			}
			if strings.Join(got, " ") != tt.want || (err != nil) != (tt.want == "") {
				t.Errorf("Route(%v %s) = %v, %v; want %s", tt.proto, tt.target, dials, err, tt.want)
			}
		})
	}
}

func TestOwnAddrsKeepsTheLastGoodList(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := netip.MustParseAddr("203.0.113.9")
		calls, fail := 0, error(nil)
		o := ownAddrs{list: func() ([]netip.Addr, error) { calls++; return []netip.Addr{a}, fail }}
		for range 10 {
			if !o.contains(a) || o.contains(netip.MustParseAddr("203.0.113.8")) {
				t.Fatal("contains is wrong about its own list")
			}
		}
		if calls != 1 {
			t.Errorf("%d reads within a moment, want 1", calls)
		}
		fail = errors.New("no memory")
		time.Sleep(ownAddrsFresh)
		if !o.contains(a) || calls != 2 {
			t.Errorf("after a failed read: contains = false or %d reads, want true and 2", calls)
		}
	})
}

func TestRefusalIsLoggedOncePerTarget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		cfg := testPolicyConfig()
		cfg.Log = slog.New(slog.NewTextHandler(&out, nil))
		p := NewPolicy(cfg)
		ask := func(port uint16) {
			p.Route(flow.Tuple{Proto: flow.TCP, Target: netip.AddrPortFrom(cfg.Host4, port)})
		}
		ask(5432)
		ask(5432)
		if n := strings.Count(out.String(), "\n"); n != 1 || !strings.Contains(out.String(), "--host-access 5432") {
			t.Errorf("%d lines, want one with the setting:\n%s", n, &out)
		}
		for port := range uint16(1000) {
			ask(port + 10000)
		}
		if n := strings.Count(out.String(), "\n"); n != refusalTargets {
			t.Errorf("%d lines after a port scan, want %d", n, refusalTargets)
		}
		time.Sleep(refusalQuiet)
		out.Reset()
		ask(5432)
		if out.Len() == 0 {
			t.Error("silent after the quiet time")
		}
	})
}

// FuzzAllowed holds Allowed to what it must never let through, whatever the form.
func FuzzAllowed(f *testing.F) {
	for _, s := range []string{
		"127.0.0.1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1:7f00:0:100::", "2002:7f00:1::", "::1", "fe80::1", "198.51.100.7", "2001:db8::1",
	} {
		b, _ := netip.MustParseAddr(s).MarshalBinary()
		f.Add(b)
	}
	p := NewPolicy(testPolicyConfig())
	f.Fuzz(func(t *testing.T, b []byte) {
		a, ok := netip.AddrFromSlice(b)
		if !ok || p.Allowed(a) != nil {
			return
		}
		a = a.Unmap()
		if a.IsLoopback() || a.IsUnspecified() || a.IsMulticast() || a.IsLinkLocalUnicast() {
			t.Fatalf("Allowed(%v) = nil", a)
		}
		if a.Is4() {
			for _, prefix := range []string{"::ffff:", "64:ff9b::", "64:ff9b:1::", "::ffff:0:"} {
				form := netip.MustParseAddr(prefix + a.String())
				if err := p.Allowed(form); err != nil {
					t.Fatalf("Allowed(%v) = nil but Allowed(%v) = %v", a, form, err)
				}
			}
			return
		}
		v4 := netip.AddrFrom4([4]byte(a.AsSlice()[12:]))
		if netip.MustParsePrefix("64:ff9b::/96").Contains(a) && p.Allowed(v4) != nil {
			t.Fatalf("Allowed(%v) = nil but %v is denied", a, v4)
		}
	})
}
