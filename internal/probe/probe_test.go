package probe

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestRunAgainstServices(t *testing.T) {
	s, err := Serve(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	r := probe(t.Context(), t, s.Targets(), "nameserver 127.0.0.1\n", nameServer(t, engineZone))
	if r.err != nil {
		t.Errorf("Run: %v", r.err)
	}
	targets := s.Targets()
	for _, c := range []struct {
		name, kind string
	}{
		{"tcp v4", "tcp4"}, {"tcp v6", "tcp6"}, {"udp v4", "udp4"}, {"udp v6", "udp6"},
		{"ping v4", "ping4"}, {"ping v6", "ping6"}, {"host tcp v4", ""}, {"host udp v4", ""},
		{"dns server", ""}, {"dns tcp", ""},
	} {
		got := r.find(c.name)
		if len(got) != 1 {
			t.Errorf("%s: %d results, want 1", c.name, len(got))
			continue
		}
		why := targets.Missing[c.kind]
		if got[0].Skipped != (why != "") || got[0].OK == got[0].Skipped {
			t.Errorf("%s: ok %v, skipped %v, missing %q", c.name, got[0].OK, got[0].Skipped, why)
		}
		if got[0].OK && (got[0].Took <= 0 || got[0].Target == "") {
			t.Errorf("%s: incomplete: %+v", c.name, got[0])
		}
		if got[0].Skipped && got[0].Detail != why {
			t.Errorf("%s: skipped because %q, want %q", c.name, got[0].Detail, why)
		}
	}
}

// Without targets everything that needs one is skipped, and says how to give it.
func TestRunWithoutTargets(t *testing.T) {
	r := probe(t.Context(), t, Targets{}, "nameserver 127.0.0.1\n", nameServer(t, engineZone))
	if r.err != nil {
		t.Errorf("Run: %v", r.err)
	}
	for _, name := range []string{"tcp v4", "tcp v6", "udp v4", "udp v6", "ping v4", "ping v6"} {
		got := r.find(name)
		if len(got) != 1 || !got[0].Skipped || !strings.Contains(got[0].Detail, "--target") {
			t.Errorf("%s: %+v", name, got)
		}
	}
	if got := r.find("host v4"); len(got) != 1 || !got[0].Skipped && !strings.HasPrefix(got[0].Detail, "allowed") {
		t.Errorf("state of host access: %+v", got)
	}
}

// A stranger's answer to every name is a failure of each check that needs it.
func TestRunOutsideAnEngine(t *testing.T) {
	r := probe(t.Context(), t, Targets{}, "nameserver 127.0.0.1\n", nameServer(t, zone{}))
	got := r.find("dns server")
	if len(got) != 1 || got[0].OK || !strings.Contains(got[0].Detail, "inside an engine") {
		t.Errorf("dns server: %+v", got)
	}
	if r.err == nil {
		t.Error("Run: no error")
	}
	for _, name := range []string{"gateway", "host", "dns ptr"} {
		if got := r.find(name); len(got) != 1 || !got[0].Skipped {
			t.Errorf("%s: %+v, want it skipped", name, got)
		}
	}
}

func TestRunFailures(t *testing.T) {
	closedTCP, closedUDP := closedPorts(t)
	port := nameServer(t, engineZone)
	r := probe(t.Context(), t, Targets{
		TCP4: netip.AddrPortFrom(loopback4, closedTCP), UDP4: netip.AddrPortFrom(loopback4, closedUDP),
		HostTCP: closedTCP,
	}, "nameserver 127.0.0.1\n", port)
	want := []string{
		"tcp v4 " + netip.AddrPortFrom(loopback4, closedTCP).String(),
		"udp v4 " + netip.AddrPortFrom(loopback4, closedUDP).String(),
		"host tcp v4 " + netip.AddrPortFrom(loopback4, closedTCP).String(),
	}
	if diff := cmp.Diff(want, r.failed()); diff != "" {
		t.Errorf("failed (-want +got):\n%s", diff)
	}
	for _, name := range []string{"tcp v4", "udp v4"} {
		if got := r.find(name); len(got) != 1 || !strings.Contains(got[0].Detail, "refused") {
			t.Errorf("%s: %+v, want it refused", name, got)
		}
	}
	if got := r.find("host udp"); len(got) != 1 || !got[0].Skipped {
		t.Errorf("host udp: %+v, want it skipped", got)
	}
}

// The end of the caller's context ends a run, and is its error.
func TestRunCancelled(t *testing.T) {
	stop := errors.New("enough")
	target := silent(t)
	var took time.Duration
	for range 5 { // on a busy machine one may take longer, but not all
		ctx, cancel := context.WithCancelCause(t.Context())
		p := newProber(Targets{TCP4: target}, func(r Result) {
			if r.Name == "dns" {
				cancel(stop)
			}
		})
		p.resolvConf = "testdata/does-not-exist"
		start := time.Now()
		if err := p.run(ctx); !errors.Is(err, stop) {
			t.Errorf("run: %v, want %v", err, stop)
		}
		if took = time.Since(start); took < checkLimit/2 {
			return
		}
	}
	t.Errorf("run took %v after its context ended", took)
}

// Nobody answers anything, twice as often as the time allows.
func TestRunIsBounded(t *testing.T) {
	t.Parallel() // it only waits
	dead := silent(t)
	udp := unansweredUDP(t)
	_, dnsPort, _ := net.SplitHostPort(udp.String())
	var r run
	for try := 1; ; try++ { // on a busy machine one may take longer, but not all
		start := time.Now()
		r = probe(t.Context(), t, Targets{TCP4: dead, TCP6: dead, UDP4: udp, UDP6: udp},
			"nameserver 127.0.0.1\nnameserver 127.0.0.2\n", dnsPort)
		if took := time.Since(start); took < 10*time.Second {
			break
		} else if try == 3 {
			t.Fatalf("Run took %v", took)
		}
	}
	if len(r.failed()) < 3 {
		t.Errorf("failed: %q", r.failed())
	}
	if got := r.find("tcp v4"); len(got) != 1 || got[0].OK || !strings.Contains(got[0].Detail, "no answer within 2s") {
		t.Errorf("tcp v4: %+v", got)
	}
}

func TestPTRHasToLeadBack(t *testing.T) {
	z := zone{"other.example.org.": {"192.0.2.1"}}
	for name, data := range engineZone {
		z[name] = data
	}
	z["1.0.0.127.in-addr.arpa."] = []string{"other.example.org."}
	r := probe(t.Context(), t, Targets{}, "nameserver 127.0.0.1\n", nameServer(t, z))
	if diff := cmp.Diff([]string{"dns ptr 127.0.0.1"}, r.failed()); diff != "" {
		t.Errorf("failed (-want +got):\n%s", diff)
	}
}

func TestFurtherNames(t *testing.T) {
	z := zone{"www.example.org.": {"192.0.2.80", "2001:db8::80"}, "80.2.0.192.in-addr.arpa.": {"www.example.org."}}
	for name, data := range engineZone {
		z[name] = data
	}
	r := probe(t.Context(), t, Targets{Names: []string{"www.example.org", "no.example.org"}}, "nameserver 127.0.0.1\n", nameServer(t, z))
	want := []string{"dns a no.example.org", "dns aaaa no.example.org", "dns ptr 2001:db8::80"}
	if diff := cmp.Diff(want, r.failed()); diff != "" {
		t.Errorf("failed (-want +got):\n%s", diff)
	}
}

func TestFormat(t *testing.T) {
	for _, c := range []struct {
		r    Result
		want string
	}{
		{Result{Name: "tcp v4", Target: "198.51.100.7:7", OK: true, Took: 312 * time.Microsecond},
			"ok    tcp v4      198.51.100.7:7                    312us"},
		{Result{Name: "udp v6", Target: "[2001:db8::7]:7", Took: 2 * time.Second, Detail: "no answer within 2s"},
			"FAIL  udp v6      [2001:db8::7]:7                  2000ms  no answer within 2s"},
		{Result{Name: "ping v6", Skipped: true, Detail: "no IPv6"},
			"skip  ping v6                                              no IPv6"},
	} {
		if diff := cmp.Diff(c.want, Format(c.r)); diff != "" {
			t.Errorf("Format (-want +got):\n%s", diff)
		}
	}
}

func TestFailedError(t *testing.T) {
	one := Result{Name: "tcp v4", Target: "192.0.2.1:7", Detail: "connection refused"}
	e := &FailedError{Failed: []Result{one}, Of: 9}
	if got, want := e.Error(), "probe on tcp v4 192.0.2.1:7: connection refused"; got != want {
		t.Errorf("Error() = %q, want %q", got, want)
	}
	e.Failed = append(e.Failed, Result{Name: "dns"})
	if got, want := e.Error(), "probe on tcp v4 192.0.2.1:7, dns: 2 of 9 checks failed"; got != want {
		t.Errorf("Error() = %q, want %q", got, want)
	}
}

// closedPorts returns ports of 127.0.0.1 on which nobody listens.
func closedPorts(t *testing.T) (tcp, udp uint16) {
	t.Helper()
	pc, ln := listenBoth(t)
	defer pc.Close()
	defer ln.Close()
	return ln.Addr().(*net.TCPAddr).AddrPort().Port(), pc.LocalAddr().(*net.UDPAddr).AddrPort().Port()
}

// silent returns a TCP address that accepts and then says nothing.
func silent(t *testing.T) netip.AddrPort {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln.Addr().(*net.TCPAddr).AddrPort()
}

// unansweredUDP returns a UDP address that says nothing.
func unansweredUDP(t *testing.T) netip.AddrPort {
	t.Helper()
	pc, err := net.ListenPacket("udp", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { pc.Close() })
	return netip.AddrPortFrom(loopback4, pc.LocalAddr().(*net.UDPAddr).AddrPort().Port())
}
