package test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/slipway-net/slipway/test/topo"
)

// How the cases of firewall_linux_test.go are tried on one guest.

// fwPort is the port of the first case.
const fwPort = 8000

// fwRun tries them. It may be used beside others: it tells errors and fails no test.
type fwRun struct {
	g      *guest
	b      *bridge
	tables iptables
	cases  []fwCase
	held   map[string]net.Conn
}

func newFWRun(t *testing.T, g *guest, tables iptables) *fwRun {
	t.Helper()
	r := &fwRun{g: g, b: newBridge(t, g, tables), tables: tables, cases: fwCases(), held: make(map[string]net.Conn)}
	t.Cleanup(r.close)
	for i := range r.cases {
		for _, ns := range []*topo.NS{g.net.World, r.b.containers[1]} {
			serveName(t, ns, fwPort+i)
		}
	}
	return r
}

// close lets go of what is held.
func (r *fwRun) close() {
	for _, c := range r.held {
		c.Close()
	}
}

// holdAll opens a connection for each case that is about world, and for the sets of
// rules for everything.
func (r *fwRun) holdAll(t *testing.T) {
	t.Helper()
	r.b.more(t, len(fwGlobal))
	if err := errors.Join(r.hold(r.cases), r.hold(fwGlobal)); err != nil {
		t.Fatal(err)
	}
	if now := r.g.pathsOf(t); now != r.g.kind.path {
		t.Errorf("%s: connections take %q", r.g.kind.name, now)
	}
}

// serveName serves on a port of all addresses: who it is that was reached, then an echo.
func serveName(t testing.TB, ns *topo.NS, port int) {
	t.Helper()
	serve(t, ns, fmt.Sprintf("[::]:%d", port), func(c *net.TCPConn) {
		defer c.Close()
		fmt.Fprintln(c, nameOf(c.LocalAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()))
		io.Copy(c, c)
	})
}

func nameOf(a netip.Addr) string {
	second4, second6 := topo.ContainerAddr(2)
	switch a {
	case topo.World4, topo.World6:
		return "world"
	case topo.Other4, topo.Other6:
		return "other"
	case second4, second6:
		return "second"
	}
	return a.String()
}

// run does everything that follows on the held connections, in order.
func (r *fwRun) run() (s fwSaid) {
	if s.err = r.tables.load(r.g.ns, r.rules()...); s.err != nil {
		return s
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		s.held = r.exchangeAll(expect(r.cases, r.heldOutcome))
	})
	s.fresh = r.probeAll(r.cases)
	wg.Wait()
	if s.counted, s.err = r.tables.counted(r.g.ns); s.err != nil {
		return s
	}
	if s.err = r.flush(); s.err != nil {
		return s
	}
	s.flushed = make(map[string]string)
	left := make(map[string]string)
	for name, now := range s.held {
		if now == goesOn && r.g.kind.native {
			left[name] = silence // see compare
		} else if now == goesOn {
			left[name] = goesOn
		}
	}
	for name, now := range r.exchangeAll(left) {
		s.flushed["before: "+name] = now
	}
	for name, now := range r.probeAll(r.cases[:1]) {
		s.flushed["after: "+name] = now
	}
	if s.tables, s.err = r.g.ns.Run("", "nft", "list", "tables"); s.err == nil {
		s.err = r.global(&s)
	}
	return s
}

// rules are those of all cases.
func (r *fwRun) rules() []string {
	rules := slices.Clone(fwCommon)
	for i, c := range r.cases {
		for _, rule := range c.rules {
			rules = append(rules, strings.NewReplacer("{p}", strconv.Itoa(fwPort+i), "{name}", c.name).Replace(rule))
		}
	}
	return rules
}

// flush removes all rules in every way that there is.
func (r *fwRun) flush() error {
	_, err := r.g.ns.Run("", "nft", "flush", "ruleset")
	return errors.Join(r.tables.flush(r.g.ns), err)
}

// global tries the rules for everything, each set alone.
func (r *fwRun) global(s *fwSaid) error {
	s.global, s.globalHeld = make(map[string]string), make(map[string]string)
	for _, set := range fwGlobal {
		if err := errors.Join(r.tables.load(r.g.ns, dockerRules...), r.tables.load(r.g.ns, set.rules...)); err != nil {
			return fmt.Errorf("%s: %w", set.name, err)
		}
		var wg sync.WaitGroup
		wg.Go(func() {
			maps.Copy(s.globalHeld, r.exchangeAll(expect([]fwCase{set}, r.heldOutcome)))
		})
		maps.Copy(s.global, r.probeAll([]fwCase{set}))
		wg.Wait()
		if err := r.flush(); err != nil {
			return err
		}
	}
	return nil
}

// each calls fn for every case, place and family, all at once. i is the case's index.
func (r *fwRun) each(cases []fwCase, fn func(i int, c fwCase, p place, f family) string) map[string]string {
	said := make(map[string]string)
	var mu sync.Mutex
	var wg sync.WaitGroup
	for i, c := range cases {
		for _, p := range r.b.places() {
			if p.name == "container" {
				p.ns = r.b.containers[c.from]
			}
			for _, f := range families {
				wg.Go(func() {
					now := fn(i, c, p, f)
					mu.Lock()
					defer mu.Unlock()
					said[fwName(c.name, p.name, f)] = now
				})
			}
		}
	}
	wg.Wait()
	return said
}

// hold opens connections that reach world.
func (r *fwRun) hold(cases []fwCase) error {
	var mu sync.Mutex
	var errs []error
	r.each(cases, func(i int, c fwCase, p place, f family) string {
		if c.to != "" {
			return ""
		}
		conn, name, err := greet(p.ns, at(f.world, fwPort+i), fwAnswer)
		mu.Lock()
		defer mu.Unlock()
		if err != nil || name != "world" {
			errs = append(errs, fmt.Errorf("%s from %s, %s: %s, %v", c.name, p.name, f.name, name, err))
			return ""
		}
		r.held[fwName(c.name, p.name, f)] = conn
		return ""
	})
	return errors.Join(errs...)
}

// pathsOf are the paths that the engine's connections take, as slipway lists them.
func (g *guest) pathsOf(t testing.TB) string {
	t.Helper()
	if g.engine == nil {
		return ""
	}
	paths := make(map[string]bool)
	for _, f := range readFlows(t, g.engine) {
		if f.Proto == "tcp" {
			paths[f.Path] = true
		}
	}
	return strings.Join(slices.Sorted(maps.Keys(paths)), " and ")
}

// heldOutcome is what is expected of a held connection.
func (r *fwRun) heldOutcome(c fwCase) outcome {
	if r.g.kind.kernel() {
		return c.onKernel()
	}
	return c.before()
}

// exchangeAll sends a byte over each held connection that want names, and waits for it.
func (r *fwRun) exchangeAll(want map[string]string) map[string]string {
	said := make(map[string]string)
	var mu sync.Mutex
	var wg sync.WaitGroup
	for name, c := range r.held {
		if want, ask := want[name]; ask {
			wg.Go(func() {
				err := exchange(c, patience(want)/2)
				mu.Lock()
				defer mu.Unlock()
				said[name] = goesOn
				if err != nil {
					said[name] = inWords(err)
				}
			})
		}
	}
	wg.Wait()
	return said
}

// probeAll makes a new connection for each case, place and family.
func (r *fwRun) probeAll(cases []fwCase) map[string]string {
	return r.each(cases, func(i int, c fwCase, p place, f family) string {
		host, port := f.world.String(), fwPort+i
		if c.to != "" {
			host, port = familyWords(f).Replace(c.to), c.port
		}
		within := patience(c.want.at(p))
		conn, name, err := greet(p.ns, net.JoinHostPort(host, strconv.Itoa(port)), within)
		if err != nil {
			return inWords(err)
		}
		defer conn.Close()
		if err := exchange(conn, within/2); err != nil {
			return fmt.Sprintf("%s, then %s", name, inWords(err))
		}
		return name
	})
}

// greet connects and reads who answers.
func greet(ns *topo.NS, address string, within time.Duration) (net.Conn, string, error) {
	c, err := ns.Dial("tcp", address, within)
	if err != nil {
		return nil, "", err
	}
	c.SetDeadline(time.Now().Add(within))
	name, err := bufio.NewReaderSize(c, 16).ReadString('\n')
	if err != nil {
		c.Close()
		return nil, "", fmt.Errorf("connected, then: %w", err)
	}
	return c, strings.TrimSpace(name), nil
}

// exchange sends a byte to an echo, which is there.
func exchange(c net.Conn, within time.Duration) error {
	c.SetDeadline(time.Now().Add(within))
	b := []byte{'x'}
	if _, err := c.Write(b); err != nil {
		return err
	}
	_, err := io.ReadFull(c, b)
	return err
}

// inWords is the errno, or silence.
func inWords(err error) string {
	var errno syscall.Errno
	switch {
	case os.IsTimeout(err) || errors.Is(err, os.ErrDeadlineExceeded):
		if strings.HasPrefix(err.Error(), "connected") {
			return "connected, then silence"
		}
		return silence
	case errors.As(err, &errno):
		return errno.Error()
	}
	return err.Error()
}
