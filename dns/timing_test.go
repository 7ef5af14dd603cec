package dns

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"
)

// fakeServers are upstreams under fake time: each answers after a delay, or never
// where the delay is negative.
type fakeServers struct {
	delay map[netip.AddrPort]time.Duration
	mu    sync.Mutex
	asked []netip.AddrPort // in order
	wg    sync.WaitGroup
}

func (f *fakeServers) dial(_ context.Context, _ string, addr netip.AddrPort) (net.Conn, error) {
	f.mu.Lock()
	f.asked = append(f.asked, addr)
	f.mu.Unlock()
	ours, theirs := net.Pipe()
	f.wg.Go(func() {
		defer theirs.Close()
		buf := make([]byte, maxMessage)
		n, err := theirs.Read(buf)
		if err != nil {
			return
		}
		if d := f.delay[addr]; d >= 0 {
			time.Sleep(d)
			buf[2] |= flagQR
			theirs.Write(buf[:n])
			return
		}
		theirs.Read(buf) // until the asker closes
	})
	return ours, nil
}

func TestTiming(t *testing.T) {
	a, b, c := netip.MustParseAddrPort("192.0.2.1:53"), netip.MustParseAddrPort("192.0.2.2:53"), netip.MustParseAddrPort("192.0.2.3:53")
	const never = -1
	patience := queryTimeout / minTries
	tests := []struct {
		name    string
		delay   map[netip.AddrPort]time.Duration
		servers []netip.AddrPort
		asked   []netip.AddrPort
		rcode   byte
		took    time.Duration
		via     transport
	}{
		{"at once", map[netip.AddrPort]time.Duration{a: 0}, []netip.AddrPort{a, b}, []netip.AddrPort{a}, rcodeSuccess, 0, overUDP},
		{"first silent", map[netip.AddrPort]time.Duration{a: never, b: 10 * time.Millisecond}, []netip.AddrPort{a, b},
			[]netip.AddrPort{a, b}, rcodeSuccess, patience + 10*time.Millisecond, overUDP},
		{"slow ones are listened to", map[netip.AddrPort]time.Duration{a: 3 * time.Second, b: never}, []netip.AddrPort{a, b},
			[]netip.AddrPort{a, b, a}, rcodeSuccess, 3 * time.Second, overUDP},
		{"one silent server", map[netip.AddrPort]time.Duration{a: never}, []netip.AddrPort{a},
			[]netip.AddrPort{a, a, a, a}, rcodeServerFailure, queryTimeout, overUDP},
		{"all silent", map[netip.AddrPort]time.Duration{a: never, b: never, c: never}, []netip.AddrPort{a, b, c},
			[]netip.AddrPort{a, b, c, a}, rcodeServerFailure, queryTimeout, overUDP},
		{"tcp repeats by itself", map[netip.AddrPort]time.Duration{a: never, b: never}, []netip.AddrPort{a, b},
			[]netip.AddrPort{a, b}, rcodeServerFailure, queryTimeout, overTCP},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := &fakeServers{delay: tt.delay}
				s := New(Config{Upstreams: func() []netip.AddrPort { return tt.servers }, Dial: f.dial})
				q, err := parseQuery(packed(t, question("example.org", dns.TypeA)))
				if err != nil {
					t.Fatal(err)
				}
				start := time.Now()
				reply := s.resolve(t.Context(), &q, tt.via)
				if took := time.Since(start); took != tt.took {
					t.Errorf("took %v, want %v", took, tt.took)
				}
				if rcode(reply) != tt.rcode {
					t.Errorf("rcode %d, want %d", rcode(reply), tt.rcode)
				}
				f.wg.Wait()
				if !slices.Equal(f.asked, tt.asked) {
					t.Errorf("asked %v, want %v", f.asked, tt.asked)
				}
			})
		})
	}
}

// A query that is under way when ctx ends gets no answer, and no goroutine stays.
func TestCancel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := netip.MustParseAddrPort("192.0.2.1:53")
		f := &fakeServers{delay: map[netip.AddrPort]time.Duration{a: -1}}
		s := New(Config{Upstreams: func() []netip.AddrPort { return []netip.AddrPort{a} }, Dial: f.dial})
		q, _ := parseQuery(packed(t, question("example.org", dns.TypeA)))
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if reply := s.resolve(ctx, &q, overUDP); reply != nil {
			t.Errorf("answered %x after ctx ended", reply)
		}
		f.wg.Wait()
	})
}

// A TCP connection ends when its guest neither asks nor takes its answers.
func TestStreamIdle(t *testing.T) {
	for _, asks := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			s := New(Config{Names: builtIn})
			guest, ours := net.Pipe() // unbuffered: who does not read takes nothing
			defer guest.Close()
			var wg sync.WaitGroup
			start := time.Now()
			wg.Go(func() {
				defer ours.Close()
				(&stream{server: s, conn: ours, room: make(chan struct{}, maxPipelined)}).serve(t.Context())
			})
			if asks {
				writeMessage(guest, packed(t, question("host.docker.internal", dns.TypeA)))
			}
			wg.Wait()
			if d := time.Since(start); d != streamIdle {
				t.Errorf("guest that asks: %v; ended after %v, want %v", asks, d, streamIdle)
			}
		})
	}
}
