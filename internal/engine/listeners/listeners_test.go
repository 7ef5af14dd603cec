package listeners

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/slipway-net/slipway/internal/flow"
)

// engine is one whose sockets and published ports a test has in its hands.
type engine struct {
	mu      sync.Mutex // guards what follows
	sockets []Socket
	cookies map[string]uint64
	failing error // of Read
	applied []string
	calls   int
	refuse  map[uint16]error // ports that cannot be published
	held    map[uint16]bool
	log     bytes.Buffer
}

// watch runs Watch until the test ends. It is to be called in a bubble.
func (e *engine) watch(t *testing.T, change func(*Config)) (stop func()) {
	c := Config{
		Guest4:     netip.MustParseAddr("192.168.65.3"),
		Guest6:     netip.MustParseAddr("fdc4:f303:9324::3"),
		LocalPorts: [2]uint16{32768, 60999},
		Read:       e.read,
		Apply:      e.apply,
		Held: func(p flow.Proto, n uint16) bool {
			e.mu.Lock()
			defer e.mu.Unlock()
			return e.held[n]
		},
		Log: slog.New(slog.NewTextHandler(&e.log, nil)),
	}
	if change != nil {
		change(&c)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { Watch(ctx, c) })
	synctest.Wait()
	return func() { cancel(); running.Wait() }
}

func (e *engine) read(found func(Socket)) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, s := range e.sockets {
		found(s)
	}
	return e.failing
}

func (e *engine) apply(specs []flow.PortSpec) (errs []error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.calls++
	e.applied = nil
	for _, s := range specs {
		if err := e.refuse[s.Host.Port()]; err != nil {
			errs = append(errs, err)
			continue
		}
		errs = append(errs, nil)
		e.applied = append(e.applied, s.String())
	}
	return errs
}

// set replaces the sockets: "tcp 0.0.0.0:80", or "tcp6only [::]:80". The same words are the
// same socket; "tcp 0.0.0.0:80 again" is another.
func (e *engine) set(words ...string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.sockets = nil
	if e.cookies == nil {
		e.cookies = make(map[string]uint64)
	}
	for _, w := range words {
		if e.cookies[w] == 0 {
			e.cookies[w] = uint64(len(e.cookies) + 1)
		}
		kind, address, _ := strings.Cut(strings.TrimSuffix(w, " again"), " ")
		s := Socket{Proto: flow.TCP, Cookie: e.cookies[w], Local: netip.MustParseAddrPort(address), Only6: kind == "tcp6only"}
		if kind == "udp" {
			s.Proto = flow.UDP
		}
		e.sockets = append(e.sockets, s)
	}
}

// want compares what is published.
func (e *engine) want(t *testing.T, words ...string) {
	t.Helper()
	e.mu.Lock()
	defer e.mu.Unlock()
	if diff := cmp.Diff(words, e.applied); diff != "" {
		t.Errorf("published (-want +got):\n%s", diff)
	}
}

func (e *engine) count() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.calls
}

// pass lets some readings pass.
func pass(readings int) {
	time.Sleep(time.Duration(readings) * interval)
	synctest.Wait()
}

func TestWhatCounts(t *testing.T) {
	for _, c := range []struct {
		name    string
		sockets []string
		want    []string
		change  func(*Config)
	}{
		{name: "wildcard4", sockets: []string{"tcp 0.0.0.0:80"}, want: []string{"0.0.0.0:80:80/tcp"}},
		{name: "wildcard6_takes_both", sockets: []string{"tcp [::]:80"}, want: []string{"80:80/tcp"}},
		{name: "wildcard6_only", sockets: []string{"tcp6only [::]:80"}, want: []string{"[::]:80:80/tcp"}},
		{name: "two_sockets", sockets: []string{"tcp 0.0.0.0:80", "tcp6only [::]:80"}, want: []string{"80:80/tcp"}},
		{name: "own_addresses", sockets: []string{"tcp 192.168.65.3:80", "tcp [fdc4:f303:9324::3]:81"},
			want: []string{"0.0.0.0:80:80/tcp", "[::]:81:81/tcp"}},
		{name: "mapped", sockets: []string{"tcp [::ffff:192.168.65.3]:80", "tcp [::ffff:0.0.0.0]:81"},
			want: []string{"0.0.0.0:80:80/tcp", "0.0.0.0:81:81/tcp"}},
		{name: "loopback", sockets: []string{"tcp 127.0.0.1:80", "tcp 127.0.0.53:53", "tcp [::1]:80", "tcp [::ffff:127.0.0.1]:80", "udp 127.0.0.1:53"}},
		{name: "bridge", sockets: []string{"tcp 172.17.0.1:53", "udp 172.17.0.1:53", "udp [fd00::1]:53"}},
		{name: "gateway", sockets: []string{"tcp 192.168.65.1:40001", "tcp [fdc4:f303:9324::1]:40001"}},
		{name: "host_address", sockets: []string{"tcp 203.0.113.9:80"}},
		{name: "shared_port", sockets: []string{"tcp 0.0.0.0:80", "tcp 0.0.0.0:80"}, want: []string{"0.0.0.0:80:80/tcp"}},
		{name: "order", sockets: []string{"tcp 0.0.0.0:8080", "udp 0.0.0.0:53", "tcp 0.0.0.0:53"},
			want: []string{"0.0.0.0:53:53/tcp", "0.0.0.0:53:53/udp", "0.0.0.0:8080:8080/tcp"}},
		{name: "udp_of_clients", sockets: []string{"udp 0.0.0.0:32768", "udp [::]:60999", "udp 0.0.0.0:32767", "udp 0.0.0.0:61000"},
			want: []string{"0.0.0.0:32767:32767/udp", "0.0.0.0:61000:61000/udp"}},
		{name: "tcp_at_a_chosen_port", sockets: []string{"tcp 0.0.0.0:40000"}, want: []string{"0.0.0.0:40000:40000/tcp"}},
		{name: "without_ipv6", sockets: []string{"tcp [::]:80", "tcp6only [::]:81"}, want: []string{"0.0.0.0:80:80/tcp"},
			change: func(c *Config) { c.Guest6 = netip.Addr{} }},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var e engine
				e.set(c.sockets...)
				defer e.watch(t, c.change)()
				pass(1)
				e.want(t, c.want...)
			})
		})
	}
}

// One reading alone neither publishes nor withdraws, and nothing is applied that is so
// already.
func TestTwoReadingsAgree(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var e engine
		e.set("tcp 0.0.0.0:80")
		stop := e.watch(t, nil)
		e.want(t)
		pass(1)
		e.want(t, "0.0.0.0:80:80/tcp")
		pass(10)
		if n := e.count(); n != 1 {
			t.Errorf("applied %d times", n)
		}

		e.set("tcp 0.0.0.0:80", "tcp 0.0.0.0:81") // for one reading
		pass(1)
		e.set("tcp 0.0.0.0:80")
		pass(2)
		e.set() // and gone for one
		pass(1)
		e.set("tcp 0.0.0.0:80")
		pass(2)
		if n := e.count(); n != 1 {
			t.Errorf("applied %d times", n)
		}

		e.set("tcp [::]:80") // IPv6 comes to it
		pass(1)
		e.want(t, "0.0.0.0:80:80/tcp")
		pass(1)
		e.want(t, "80:80/tcp")

		e.set()
		pass(1)
		e.want(t, "80:80/tcp")
		pass(1)
		e.want(t)

		e.set("tcp 0.0.0.0:82")
		pass(2)
		e.want(t, "0.0.0.0:82:82/tcp")
		stop()
		e.want(t)
	})
}

// What somebody else has is tried again, ever more rarely, and said once.
func TestTriedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := engine{refuse: map[uint16]error{80: errors.New("port 80 is taken by nginx (pid 812)")}}
		e.set("tcp 0.0.0.0:80", "tcp 0.0.0.0:81")
		stop := e.watch(t, nil)
		pass(1)
		e.want(t, "0.0.0.0:81:81/tcp")

		begin, calls := time.Now(), e.count()
		var gaps []time.Duration
		for last := begin; time.Since(begin) < 5*time.Minute; pass(1) {
			if n := e.count(); n != calls {
				gaps, calls, last = append(gaps, time.Since(last)), n, time.Now()
			}
		}
		want := []time.Duration{2e9, 4e9, 8e9, 16e9, 32e9, 60e9, 60e9, 60e9}
		if diff := cmp.Diff(want, gaps); diff != "" {
			t.Errorf("time between tries (-want +got):\n%s", diff)
		}

		e.set("tcp 0.0.0.0:80", "tcp 0.0.0.0:82") // a change is a try, and begins anew
		pass(2)
		e.want(t, "0.0.0.0:82:82/tcp")
		e.mu.Lock()
		e.refuse = nil
		e.mu.Unlock()
		pass(int(firstRetry / interval))
		e.want(t, "0.0.0.0:80:80/tcp", "0.0.0.0:82:82/tcp")
		calls = e.count()
		pass(1000)
		if n := e.count(); n != calls {
			t.Errorf("applied %d times although all is well", n-calls)
		}
		stop()
		if n := strings.Count(e.log.String(), "taken by nginx"); n != 1 {
			t.Errorf("said %d times:\n%s", n, &e.log)
		}
	})
}

// lowPort is an error with a remedy.
type lowPort struct{}

func (lowPort) Error() string { return "port 80 is privileged" }
func (lowPort) Hint() string  { return "sysctl it" }

func TestRemedyIsSaid(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := engine{refuse: map[uint16]error{80: fmt.Errorf("publish: %w", lowPort{})}}
		e.set("tcp 0.0.0.0:80")
		stop := e.watch(t, nil)
		pass(1)
		stop()
		if !strings.Contains(e.log.String(), `why="publish: port 80 is privileged" hint="sysctl it"`) {
			t.Errorf("said:\n%s", &e.log)
		}
	})
}

// An engine that asks for ever other ports does not fill the log.
func TestLogIsLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := engine{refuse: map[uint16]error{}}
		var odd, even []string
		for n := uint16(1); n <= 200; n++ {
			e.refuse[n] = fmt.Errorf("port %d is taken", n)
			word := fmt.Sprintf("tcp 0.0.0.0:%d", n)
			if n%2 == 0 {
				even = append(even, word)
			} else {
				odd = append(odd, word)
			}
		}
		stop := e.watch(t, nil)
		begin := time.Now()
		for range 10 {
			e.set(odd...)
			pass(2)
			e.set(even...)
			pass(2)
		}
		stop()
		lines, most := strings.Count(e.log.String(), "\n"), saidAtOnce+int(time.Since(begin)/sayEvery)
		if lines < saidAtOnce || lines > most || !strings.Contains(e.log.String(), " not_logged_before=") {
			t.Errorf("%d lines, want %d to %d, and the number of those that are left out:\n%s", lines, saidAtOnce, most, &e.log)
		}
	})
}

// A port that somebody else has published is no failure, and its sockets are never ours.
func TestHeldByOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := engine{held: map[uint16]bool{80: true}}
		hold := func(held bool) {
			e.mu.Lock()
			defer e.mu.Unlock()
			e.held[80] = held
		}
		e.set("tcp 0.0.0.0:80", "tcp6only [::]:80", "tcp 0.0.0.0:81")
		stop := e.watch(t, nil)
		pass(1)
		e.want(t, "0.0.0.0:81:81/tcp")

		hold(false) // the proxy has withdrawn its port, and goes on listening
		pass(1000)
		e.want(t, "0.0.0.0:81:81/tcp")
		e.set("tcp 0.0.0.0:81") // a reading that has lost it
		pass(1)
		e.set("tcp 0.0.0.0:80", "tcp6only [::]:80", "tcp 0.0.0.0:81")
		pass(1000)
		e.want(t, "0.0.0.0:81:81/tcp")
		calls := e.count()
		if calls != 1 {
			t.Errorf("applied %d times although all is well", calls)
		}

		e.set("tcp 0.0.0.0:80 again", "tcp6only [::]:80", "tcp 0.0.0.0:81") // somebody who follows it
		pass(2)
		e.want(t, "0.0.0.0:80:80/tcp", "0.0.0.0:81:81/tcp")
		hold(true) // taken from us, too
		pass(1)
		e.want(t, "0.0.0.0:81:81/tcp")
		hold(false)
		pass(1000)
		e.want(t, "0.0.0.0:81:81/tcp")
		if n := e.count(); n != calls+2 {
			t.Errorf("applied %d times, want 2", n-calls)
		}

		e.set("tcp 0.0.0.0:81")
		pass(2)
		e.set("tcp 0.0.0.0:80", "tcp 0.0.0.0:81") // forgotten with its end
		pass(2)
		e.want(t, "0.0.0.0:80:80/tcp", "0.0.0.0:81:81/tcp")
		stop()
		if e.log.Len() > 0 {
			t.Errorf("said:\n%s", &e.log)
		}
	})
}

// When the sockets cannot be read, everything stays as it is.
func TestUnreadable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var e engine
		e.set("tcp 0.0.0.0:80")
		stop := e.watch(t, nil)
		pass(1)
		e.mu.Lock()
		e.sockets, e.failing = nil, errors.New("no buffer space available")
		e.mu.Unlock()
		pass(10)
		e.want(t, "0.0.0.0:80:80/tcp")
		stop()
		if n := strings.Count(e.log.String(), "no buffer space"); n != 1 {
			t.Errorf("said %d times:\n%s", n, &e.log)
		}
	})
}

func TestTooManyPorts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var e engine
		var words []string
		for n := maxPorts + 10; n > 0; n-- {
			words = append(words, fmt.Sprintf("tcp 0.0.0.0:%d", n))
		}
		e.set(words...)
		stop := e.watch(t, nil)
		pass(1)
		e.mu.Lock()
		n, first, last := len(e.applied), e.applied[0], e.applied[len(e.applied)-1]
		e.mu.Unlock()
		if n != maxPorts || first != "0.0.0.0:1:1/tcp" || last != "0.0.0.0:4096:4096/tcp" {
			t.Errorf("%d ports, %s to %s", n, first, last)
		}
		stop()
		if !strings.Contains(e.log.String(), "publish 4106 listeners: only 4096 are") {
			t.Errorf("said:\n%s", &e.log)
		}
	})
}
