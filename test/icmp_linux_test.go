package test

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/slipway-net/slipway/test/topo"
)

func ping(f family, args ...string) []string {
	version := "-4"
	if f.v6 {
		version = "-6"
	}
	return append([]string{"ping", version, "-n", "-q", "-W", "2"}, args...)
}

// run3 runs a command up to three times, until it says what is wanted: its own patience is
// short, and a busy machine stalls now and then.
func (g *guest) run3(t testing.TB, args []string, ok func(r result) bool) (r result, good bool) {
	t.Helper()
	for range 3 {
		if r = g.run(t, args...); ok(r) {
			return r, true
		}
		t.Logf("%v: status %d\n%s%s", args, r.code, r.stdout, r.stderr)
	}
	return r, false
}

// TestPing: echoes reach the target and come back, of any size, and nobody
// answers for the dead.
func TestPing(t *testing.T) {
	need(t, "ping")
	eachGuestAtOnce(t, func(t *testing.T, g *guest) {
		eachFamily(t, func(t *testing.T, f family) {
			for _, size := range []string{"0", "56", "1472", "8000"} {
				// ping waits for the last answers for twice the time of the first.
				if r, ok := g.run3(t, ping(f, "-c", "3", "-i", "0.01", "-s", size, f.world.String()), func(r result) bool {
					return r.code == 0 && strings.Contains(r.stdout, "3 received")
				}); !ok {
					t.Errorf("ping of %s bytes: status %d\n%s%s", size, r.code, r.stdout, r.stderr)
				}
			}
			if r, ok := g.run3(t, ping(f, "-c", "1", f.gateway.String()), func(r result) bool { return r.code == 0 }); !ok {
				t.Errorf("ping of the gateway: status %d\n%s%s", r.code, r.stdout, r.stderr)
			}
			dead, hole := topo.Dead4, topo.BlackHole4
			if f.v6 {
				dead, hole = topo.Dead6, topo.BlackHole6
			}
			var wg sync.WaitGroup
			for _, a := range []netip.Addr{dead, hole} {
				wg.Go(func() {
					t.Run("nobody at "+a.String(), func(t *testing.T) {
						if r := g.run(t, ping(f, "-c", "1", a.String())...); r.code == 0 || !strings.Contains(r.stdout, " 0 received") {
							t.Errorf("status %d\n%s", r.code, r.stdout)
						}
					})
				})
			}
			wg.Wait()
		})
	})
}

// TestTimeExceeded: an echo whose hop limit runs out is answered by the router
// where that happens.
func TestTimeExceeded(t *testing.T) {
	need(t, "ping")
	eachGuestAtOnce(t, func(t *testing.T, g *guest) {
		eachFamily(t, func(t *testing.T, f family) {
			for ttl, who := range map[string]netip.Addr{"1": f.gateway, "2": f.router} {
				args := slices.DeleteFunc(ping(f, "-c", "1", "-t", ttl, f.world.String()), func(s string) bool { return s == "-q" })
				if r, ok := g.run3(t, args, func(r result) bool {
					return strings.Contains(r.stdout, fmt.Sprintf("From %v icmp_seq=1 Time", who))
				}); !ok {
					t.Errorf("hop limit %s: not told by %v\n%s%s", ttl, who, r.stdout, r.stderr)
				}
			}
		})
	})
}

// TestTraceroute: traceroute and mtr show the true path, for ICMP and UDP.
func TestTraceroute(t *testing.T) {
	need(t, "traceroute", "mtr")
	eachGuestAtOnce(t, func(t *testing.T, g *guest) {
		eachFamily(t, func(t *testing.T, f family) {
			version := "-4"
			if f.v6 {
				version = "-6"
			}
			want := []string{f.gateway.String(), f.router.String(), f.world.String()}
			var wg sync.WaitGroup
			for _, args := range [][]string{
				{"traceroute", version, "-n", "-q", "1", "-w", "2", "-m", "6", f.world.String()},
				{"traceroute", version, "-n", "-I", "-q", "1", "-w", "2", "-m", "6", f.world.String()},
				{"mtr", version, "-n", "--report", "--report-wide", "-c", "1", "-G", "2", f.world.String()},
				{"mtr", version, "-n", "--udp", "--report", "--report-wide", "-c", "1", "-G", "2", f.world.String()},
			} {
				wg.Go(func() {
					t.Run(strings.Join(args, " "), func(t *testing.T) {
						if r, ok := g.run3(t, args, func(r result) bool {
							return r.code == 0 && slices.Equal(hops(r.stdout), want)
						}); !ok {
							t.Errorf("status %d, hops %v, expected %v\n%s%s", r.code, hops(r.stdout), want, r.stdout, r.stderr)
						}
					})
				})
			}
			wg.Wait()
		})
	})
}

// hopLine matches "  2  198.51.100.1  0.1 ms" and "  2.|-- 198.51.100.1  0.0% ...".
var hopLine = regexp.MustCompile(`(?m)^ *\d+(?:\.\|--)? +([0-9a-f.:]+|\*|\?\?\?) `)

func hops(out string) []string {
	var all []string
	for _, m := range hopLine.FindAllStringSubmatch(out, -1) {
		all = append(all, m[1])
	}
	return all
}

// TestUnreachablePing: a router's word about an echo reaches the one who sent it.
func TestUnreachablePing(t *testing.T) {
	need(t, "ping")
	eachGuestAtOnce(t, func(t *testing.T, g *guest) {
		eachFamily(t, func(t *testing.T, f family) {
			a, router := topo.Unreachable4, topo.Router4
			if f.v6 {
				a, router = topo.Unreachable6, topo.Router6
			}
			args := slices.DeleteFunc(ping(f, "-c", "1", a.String()), func(s string) bool { return s == "-q" })
			if r, ok := g.run3(t, args, func(r result) bool {
				return r.code != 0 && strings.Contains(r.stdout, fmt.Sprintf("From %v icmp_seq=1 Destination", router))
			}); !ok {
				t.Errorf("status %d\n%s%s", r.code, r.stdout, r.stderr)
			}
		})
	})
}
