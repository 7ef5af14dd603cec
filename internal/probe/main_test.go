package probe

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/dns"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// missing is called when this machine lacks what a test needs.
func missing(t *testing.T, err error) {
	t.Helper()
	if os.Getenv("NETNS_TESTS") == "require" {
		t.Fatalf("this machine lacks what the test needs: %v", err)
	}
	t.Skipf("this machine lacks what the test needs: %v", err)
}

var (
	loopback4 = netip.MustParseAddr("127.0.0.1")
	loopback6 = netip.MustParseAddr("::1")
)

// zone is a name server's content: name or reverse name to addresses or names.
type zone map[string][]string

// engineZone has the names of an engine whose gateway and host are on loopback.
var engineZone = zone{
	"gateway.slipway.internal.": {"127.0.0.1"},
	"host.slipway.internal.":    {"127.0.0.1"},
	"1.0.0.127.in-addr.arpa.":   {"Gateway.slipway.internal."},
}

// nameServer runs a name server on loopback until the test ends, over UDP and TCP,
// and returns its port.
func nameServer(t *testing.T, z zone) string {
	t.Helper()
	pc, ln := listenBoth(t)
	for _, s := range []*dns.Server{{PacketConn: pc}, {Listener: ln}} {
		s.Handler = z
		started, done := make(chan struct{}), make(chan error, 1)
		s.NotifyStartedFunc = func() { close(started) }
		go func() { done <- s.ActivateAndServe() }()
		<-started
		t.Cleanup(func() {
			s.Shutdown()
			if err := <-done; err != nil {
				t.Errorf("name server: %v", err)
			}
		})
	}
	_, port, _ := net.SplitHostPort(pc.LocalAddr().String())
	return port
}

// listenBoth returns a UDP and a TCP socket on one port.
func listenBoth(t *testing.T) (net.PacketConn, net.Listener) {
	t.Helper()
	for range portTries {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		if pc, err := net.ListenPacket("udp", ln.Addr().String()); err == nil {
			return pc, ln
		}
		ln.Close()
	}
	t.Fatal("no port is free in both protocols")
	return nil, nil
}

// ServeDNS implements dns.Handler.
func (z zone) ServeDNS(w dns.ResponseWriter, q *dns.Msg) {
	r := new(dns.Msg).SetReply(q)
	asked := q.Question[0]
	data, ok := z[dns.CanonicalName(asked.Name)]
	if !ok {
		r.Rcode = dns.RcodeNameError
	}
	for _, d := range data {
		header := dns.RR_Header{Name: asked.Name, Rrtype: asked.Qtype, Class: dns.ClassINET, Ttl: 10}
		a, err := netip.ParseAddr(d)
		switch {
		case err != nil && asked.Qtype == dns.TypePTR:
			r.Answer = append(r.Answer, &dns.PTR{Hdr: header, Ptr: d})
		case err == nil && a.Is4() && asked.Qtype == dns.TypeA:
			r.Answer = append(r.Answer, &dns.A{Hdr: header, A: a.AsSlice()})
		case err == nil && a.Is6() && asked.Qtype == dns.TypeAAAA:
			r.Answer = append(r.Answer, &dns.AAAA{Hdr: header, AAAA: a.AsSlice()})
		}
	}
	w.WriteMsg(r)
}

// run is one run of the probe with the given resolv.conf.
type run struct {
	results []Result
	err     error
}

func probe(ctx context.Context, t *testing.T, targets Targets, resolvConf, dnsPort string) run {
	t.Helper()
	var r run
	p := newProber(targets, func(res Result) { r.results = append(r.results, res) })
	p.resolvConf = filepath.Join(t.TempDir(), "resolv.conf")
	p.dnsPort = dnsPort
	if err := os.WriteFile(p.resolvConf, []byte(resolvConf), 0o600); err != nil {
		t.Fatal(err)
	}
	r.err = p.run(ctx)
	t.Cleanup(func() {
		if t.Failed() {
			for _, res := range r.results {
				t.Log(Format(res))
			}
			t.Log(r.err)
		}
	})
	return r
}

// find returns the results whose name is name.
func (r run) find(name string) []Result {
	return slices.DeleteFunc(slices.Clone(r.results), func(res Result) bool { return res.Name != name })
}

// failed names what failed.
func (r run) failed() []string {
	var failed *FailedError
	var names []string
	if errors.As(r.err, &failed) {
		for _, res := range failed.Failed {
			names = append(names, strings.TrimSpace(res.Name+" "+res.Target))
		}
	}
	return names
}
