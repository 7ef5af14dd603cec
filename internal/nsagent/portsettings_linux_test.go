package nsagent

import (
	"os"
	"strings"
	"testing"
)

func init() {
	guestTests = append(guestTests,
		guestTest{"port_settings", testPortSettings},
		guestTest{"port_settings_of_others", testPortSettingsOfOthers},
		guestTest{"udp_timeout_is_only_raised", testUDPTimeoutIsOnlyRaised},
		guestTest{"local_ports", testLocalPorts},
	)
}

// showPortSettings prints the settings that settlePorts knows.
const showPortSettings = "cd " + netDir + "; cat " + udpTimeout + " " + udpTimeoutStream +
	" ipv4/ip_nonlocal_bind ipv6/ip_nonlocal_bind"

func needConntrack(t *testing.T) {
	t.Helper()
	if _, err := os.Stat(netDir + udpTimeout); err != nil {
		missing(t, "conntrack: %v", err)
	}
}

// A namespace of our own gets what published ports need, and without being asked for it
// no program may listen on addresses that are not there.
func testPortSettings(t *testing.T) {
	for _, nonlocal := range []bool{true, false} {
		spec := testSpec(t)
		spec.NonlocalBind = nonlocal
		g := start(t, spec)
		needConntrack(t) // the rules have loaded it, if there is one
		want := "120\n120\n0\n0"
		if nonlocal {
			want = "120\n120\n1\n1"
		}
		if got := g.sh(t, showPortSettings); got != want {
			t.Errorf("nonlocal bind %v: %q, want %q", nonlocal, got, want)
		}
		if r := g.Report(); r.UDPTimeout != 120 || r.NonlocalBind != "" || r.LocalPorts != [2]uint16{32768, 60999} {
			t.Errorf("nonlocal bind %v: %+v", nonlocal, r)
		}
	}
}

// Somebody else's namespace stays as it is, and what it has is reported.
func testPortSettingsOfOthers(t *testing.T) {
	needConntrack(t)
	f := newForeign(t, ordinaryUser())
	f.sh(t, "cd "+netDir+"; echo 7 >"+udpTimeoutStream+"; echo 40000 40009 >"+localPortRange)
	before := f.sh(t, showPortSettings)
	spec := joinSpec(t, Join{PID: f.pid})
	spec.NonlocalBind = true
	r := start(t, spec).Report()
	if r.UDPTimeout != 7 || r.LocalPorts != [2]uint16{40000, 40009} || r.NonlocalBind != "net.ipv4.ip_nonlocal_bind is 0" {
		t.Errorf("%+v", r)
	}
	if after := f.sh(t, showPortSettings); after != before {
		t.Errorf("before %q, after %q", before, after)
	}
	willing := newForeign(t, ordinaryUser())
	willing.sh(t, "cd "+netDir+"; echo 1 >ipv4/ip_nonlocal_bind; echo 1 >ipv6/ip_nonlocal_bind")
	spec.Join = &Join{PID: willing.pid}
	if why := start(t, spec).Report().NonlocalBind; why != "" {
		t.Errorf("it may listen where it likes: %q", why)
	}
}

func testUDPTimeoutIsOnlyRaised(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		needConntrack(t)
		for _, c := range []struct {
			now  string
			own  bool
			want int
			left string
		}{
			{"30", true, 120, "120"},
			{"30", false, 30, "30"},
			{"600", true, 600, "600"},
		} {
			if err := changeNetSysctl(udpTimeout, c.now); err != nil {
				t.Fatal(err)
			}
			if got := settleUDP(udpTimeout, firstUDPTimeout, c.own); got != c.want {
				t.Errorf("%+v: %d", c, got)
			}
			if left, err := readNetSysctl(udpTimeout); err != nil || left != c.left {
				t.Errorf("%+v: %q is left, %v", c, left, err)
			}
		}
		if got := settleUDP("netfilter/no_such_setting", firstUDPTimeout, true); got != firstUDPTimeout {
			t.Errorf("without conntrack: %d", got)
		}
	})
}

func testLocalPorts(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		s, err := readNetSysctl(localPortRange)
		if err != nil || len(strings.Fields(s)) != 2 {
			t.Fatalf("%q, %v", s, err)
		}
		if got := localPorts(); got != [2]uint16{firstLocalPort, finalLocalPort} {
			t.Errorf("a new namespace has %v", got)
		}
	})
}
