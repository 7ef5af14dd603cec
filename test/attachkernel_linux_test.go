package test

import (
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/slipway-net/slipway/test/topo"
	"golang.org/x/sys/unix"
)

// attachable is a namespace with a name, for `slipway attach --netns`.
type attachable struct {
	*topo.NS
	net  *topo.Topology
	path string
}

// newAttachable makes an empty namespace that has a name until the test is over.
func newAttachable(t testing.TB, n *topo.Topology) *attachable {
	t.Helper()
	ns, err := topo.NewNS("attached")
	if err != nil {
		t.Fatal(err)
	}
	a := &attachable{NS: ns, net: n, path: filepath.Join("/run/netns", newName())}
	err = os.WriteFile(a.path, nil, 0o444)
	if err == nil {
		err = ns.Do(func() error {
			return unix.Mount("/proc/thread-self/ns/net", a.path, "", unix.MS_BIND, "")
		})
	}
	t.Cleanup(func() {
		a.remove()
		ns.Close()
	})
	if err == nil && !isRoot() {
		// "Nobody may ping" names a group that a user namespace does not have, so that
		// it could not be put back.
		err = ns.Sysctl("net.ipv4.ping_group_range", "0 0")
	}
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// remove takes the name away, as `ip netns delete` does.
func (a *attachable) remove() error {
	unix.Unmount(a.path, unix.MNT_DETACH)
	return os.Remove(a.path)
}

// attach starts `slipway attach` and waits until it answers.
func (a *attachable) attach(t testing.TB, flags ...string) *engine {
	t.Helper()
	return a.attachAs(t, newName(), flags...)
}

// attachAs does so with a name, which may have been used before.
func (a *attachable) attachAs(t testing.TB, name string, flags ...string) *engine {
	t.Helper()
	e := &engine{name: name, net: a.net, guest: a.NS, done: make(chan struct{})}
	e.cmd = e.slipway(append([]string{"attach", "--name", e.name, "--netns", a.path}, flags...)...)
	stdin, out := e.begin(t)
	e.stdin = stdin
	out.Close()
	t.Cleanup(func() {
		if t.Failed() {
			e.dump(t)
		}
		e.cmd.Process.Kill()
		<-e.done
	})
	if !eventually(30*time.Second, func() bool {
		select {
		case <-e.done:
			return true
		default:
			return e.call(t, "status", e.name).code == 0
		}
	}) || e.state != nil {
		t.Fatalf("attach does not serve: %s", e.stderr.String())
	}
	return e
}

// tryAttach runs an attach that is expected to end by itself.
func (a *attachable) tryAttach(t testing.TB, flags ...string) result {
	t.Helper()
	args := append([]string{"attach", "--name", newName(), "--netns", a.path}, flags...)
	return finish(t, a.net.Host, user{}.slipway(args...), 30*time.Second)
}

// detach ends the daemon in order.
func (a *attachable) detach(t testing.TB, e *engine) {
	t.Helper()
	e.cmd.Process.Signal(syscall.SIGTERM)
	waitEnd(t, e)
}

func waitEnd(t testing.TB, e *engine) {
	t.Helper()
	select {
	case <-e.done:
	case <-time.After(15 * time.Second): // less than stop_timeout
		t.Errorf("attach did not end within 15 s: %s", e.stderr.String())
	}
}

// nsState is all that an attach could leave in a namespace.
type nsState map[string]string

func stateOf(t testing.TB, ns *topo.NS) nsState {
	t.Helper()
	s := make(nsState)
	for _, cmd := range []string{
		"nft list ruleset", "ip rule", "ip -6 rule", "ip route show table all", "ip -6 route show table all", "ip -o addr", "ip -o link",
	} {
		out, err := ns.Run("", strings.Fields(cmd)...)
		if err != nil {
			t.Fatal(err)
		}
		lines := strings.Split(out, "\n")
		if strings.HasPrefix(cmd, "ip") {
			slices.Sort(lines)
		}
		s[cmd] = strings.Join(lines, "\n")
	}
	err := ns.Do(func() error {
		// A directory tree that each thread sees as its namespace's.
		return filepath.WalkDir("/proc/sys/net", func(path string, d os.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() || strings.Contains(path, "nf_conntrack_count") ||
				strings.HasSuffix(path, "stable_secret") || strings.Contains(path, "/netdev_") {
				return nil
			}
			if b, err := os.ReadFile(path); err == nil {
				s[path] = string(b)
			}
			return nil
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// expect wants the state to be the same, soon.
func (s nsState) expect(t testing.TB, ns *topo.NS) {
	t.Helper()
	var differ []string
	if !eventually(15*time.Second, func() bool {
		differ = nil
		now := stateOf(t, ns)
		for k, v := range s {
			if now[k] != v {
				differ = append(differ, fmt.Sprintf("%s: was\n%s\nis\n%s", k, v, now[k]))
			}
		}
		for k, v := range now {
			if _, ok := s[k]; !ok {
				differ = append(differ, fmt.Sprintf("%s is new: %s", k, v))
			}
		}
		return len(differ) == 0
	}) {
		slices.Sort(differ)
		t.Errorf("the namespace is not as before:\n%s", strings.Join(differ, "\n"))
	}
}

// TestAttachKernel: what attach makes in a namespace is there while it serves, and then
// gone to the last rule, route and sysctl; flows end with it.
func TestAttachKernel(t *testing.T) {
	need(t, "ip", "nft", "nsenter")
	n := newTopology(t)
	guest := newAttachable(t, n)
	before := stateOf(t, guest.NS)
	for range 2 {
		e := guest.attach(t, "--path", "kernel")
		expectPaths(t, e, "kernel", "kernel", "")
		during := stateOf(t, guest.NS)
		for _, what := range []string{"nft list ruleset", "ip rule", "ip -6 rule", "ip route show table all", "ip -6 route show table all"} {
			if during[what] == before[what] {
				t.Errorf("%s is the same with and without attach, so it proves nothing:\n%s", what, before[what])
			}
		}
		c, peer := connected(t, guestOf(e), families[0])
		guest.detach(t, e)
		if code := status(e.state); code != 0 {
			t.Errorf("attach ended with status %d: %s", code, e.stderr.String())
		}
		expectReset(t, c)
		expectReset(t, peer)
		before.expect(t, guest.NS)
		expectNetless(t, guest.NS)
	}
}

// guestOf is an attached namespace as the suites have guests.
func guestOf(e *engine) *guest { return &guest{net: e.net, ns: e.guest, engine: e} }

// expectNetless wants the device to be gone soon, and then connect(2) to the world to
// fail at once with ENETUNREACH.
func expectNetless(t testing.TB, ns *topo.NS) {
	t.Helper()
	if !eventually(10*time.Second, func() bool {
		_, err := ns.Run("", "ip", "link", "show", "slipway0")
		return err != nil
	}) {
		t.Error("the device is still there after 10 s")
	}
	for _, f := range families {
		const most = 100 * time.Millisecond
		if s, took := dialPromptly(ns, at(f.world, 80), most); s != syscall.ENETUNREACH.Error() || took > most {
			t.Errorf("%s without a daemon: %s after %v", f.name, s, took)
		}
	}
}

// TestAttachKilled: after kill -9 of the daemon or of its agent nothing hangs, nothing
// takes SYNs that nobody answers, and the next attach works as the first.
func TestAttachKilled(t *testing.T) {
	need(t, "ip", "nft", "nsenter")
	for _, path := range []string{"kernel", "netstack"} {
		for _, whom := range []string{"daemon", "agent"} {
			t.Run(path+"/"+whom, func(t *testing.T) { testAttachKilled(t, path, whom) })
		}
	}
}

func testAttachKilled(t *testing.T, path, whom string) {
	guest := newAttachable(t, newTopology(t))
	before := stateOf(t, guest.NS)
	e := guest.attach(t, "--path", path)
	expectPaths(t, e, path, path, "")
	pid := e.cmd.Process.Pid
	earlier := openFiles(t, pid)
	c, peer := connected(t, guestOf(e), families[0])
	expectClosedLast(t, earlier, openFiles(t, pid))
	if whom == "agent" {
		pid = readHealth(t, e).Engine.AgentPID
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	expectNetless(t, guest.NS)
	waitEnd(t, e)
	if whom == "agent" {
		if code := status(e.state); code == 0 || !strings.Contains(e.stderr.String(), "slipway: ") {
			t.Errorf("status %d after the agent was killed: %s", code, e.stderr.String())
		}
	}
	peer.SetDeadline(time.Now().Add(15 * time.Second))
	if _, err := peer.Read(make([]byte, 1)); err == nil || os.IsTimeout(err) {
		t.Errorf("the target sees %v", err)
	}
	if path == "kernel" { // its socket was the daemon's
		c.SetDeadline(time.Now().Add(15 * time.Second))
		if _, err := c.Read(make([]byte, 1)); err == nil || os.IsTimeout(err) {
			t.Errorf("the guest sees %v", err)
		}
	}
	var now nsState
	if !eventually(10*time.Second, func() bool {
		now = stateOf(t, guest.NS)
		return now["nft list ruleset"] == before["nft list ruleset"]
	}) {
		t.Errorf("rules are left:\n%s", now["nft list ruleset"])
	}
	e = guest.attach(t, "--path", path)
	expectPaths(t, e, path, path, "")
	guest.detach(t, e)
	if whom == "agent" {
		// Whoever may ping is what the killed agent made of it: nobody knows what it was.
		const ping = "/proc/sys/net/ipv4/ping_group_range"
		before[ping] = now[ping]
	}
	before.expect(t, guest.NS)
	expectNetless(t, guest.NS)
}

// openFiles returns what the descriptors of a process lead to.
func openFiles(t *testing.T, pid int) map[int]string {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	all := make(map[int]string, len(entries))
	for _, e := range entries {
		fd, err := strconv.Atoi(e.Name())
		if err != nil {
			t.Fatal(err)
		}
		all[fd], _ = os.Readlink(filepath.Join(dir, e.Name())) // it may be closed by now
	}
	return all
}

// expectClosedLast wants all descriptors of the TUN to have numbers below those of sockets,
// listeners and flows alike, and of all that is new in now: the kernel closes those of a
// killed process in falling order, and the sockets have to be reset while the guest still has
// its device. A listener resets what nobody has accepted yet.
func expectClosedLast(t *testing.T, earlier, now map[int]string) {
	t.Helper()
	tun := -1
	for fd, what := range now {
		if what == "/dev/net/tun" {
			tun = max(tun, fd)
		}
	}
	for fd, what := range now {
		_, old := earlier[fd]
		if (!old || strings.HasPrefix(what, "socket:")) && fd < tun || tun < 0 {
			t.Errorf("the daemon has %s as descriptor %d, the TUN is %d", what, fd, tun)
		}
	}
}

// TestAttachedIsDeleted: the namespace loses its name while flows are live.
func TestAttachedIsDeleted(t *testing.T) {
	need(t, "ip", "nft", "nsenter")
	guest := newAttachable(t, newTopology(t))
	before := stateOf(t, guest.NS)
	e := guest.attach(t, "--path", "kernel")
	c, peer := connected(t, guestOf(e), families[1])
	if err := guest.remove(); err != nil {
		t.Fatal(err)
	}
	waitEnd(t, e)
	if e.state != nil && status(e.state) != 0 {
		t.Errorf("attach ended with status %d: %s", status(e.state), e.stderr.String())
	}
	expectReset(t, c)
	expectReset(t, peer)
	before.expect(t, guest.NS)
}

// newContainers makes a bridge in the namespace and two containers behind it.
func newContainers(t testing.TB, ns *topo.NS) (all []*topo.NS) {
	t.Helper()
	b, err := topo.NewBridge(ns)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Close)
	for range 2 {
		c, err := b.Container()
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, c)
	}
	return all
}

// TestStoppedDaemon stops the daemon for 3 s, as a debugger or an overloaded machine
// does: what needs it waits and then goes on, what does not never notices.
func TestStoppedDaemon(t *testing.T) {
	const stop = 3 * time.Second
	eachEngineAtOnce(t, func(t *testing.T, g *guest) {
		containers := newContainers(t, g.ns)
		from := map[string]*topo.NS{"the namespace itself": g.ns, "a container": containers[0]}
		var local []string // what both reach without a daemon
		for i, c := range containers {
			a4, a6 := topo.ContainerAddr(i + 1)
			local = append(local, echoServer(t, c, at(a4, 0)), echoServer(t, c, at(a6, 0)))
		}
		local = append(local, echoServer(t, g.ns, at(topo.Bridge4, 0)), echoServer(t, g.ns, at(topo.Bridge6, 0)))
		loopback := []string{echoServer(t, g.ns, "127.0.0.1:0"), echoServer(t, g.ns, "[::1]:0")}
		world := make([]string, len(families))
		var held []net.Conn
		for i, f := range families {
			world[i] = echoServer(t, g.net.World, at(f.world, 0))
			for _, ns := range from {
				c := dialEcho(t, ns, world[i])
				held = append(held, c)
			}
		}
		between := dialEcho(t, containers[0], local[2])

		process := g.engine.cmd.Process
		defer process.Signal(syscall.SIGCONT)
		pause(t, process)
		start := time.Now()
		type answer struct {
			what string
			err  error
			at   time.Time
		}
		late := make(chan answer)
		for who, ns := range from {
			for _, a := range world {
				go func() {
					c, err := ns.Dial("tcp", a, 20*time.Second)
					if err == nil {
						err = echoOnce(c)
						c.Close()
					}
					late <- answer{who + " to " + a, err, time.Now()}
				}()
			}
		}
		for round := 0; time.Since(start) < stop; round++ {
			for who, ns := range from {
				for _, a := range local {
					expectFast(t, who, ns, a)
				}
			}
			for _, a := range loopback {
				expectFast(t, "the namespace itself", g.ns, a)
			}
			roundTrip(t, between)
			time.Sleep(200 * time.Millisecond)
		}
		resumed := time.Now()
		process.Signal(syscall.SIGCONT)
		for range len(from) * len(world) {
			// The SYN that waits is answered, not the one that is repeated 4 s later.
			if a := receive(t, late); a.err != nil || a.at.Before(resumed) || a.at.Sub(resumed) > 3500*time.Millisecond {
				t.Errorf("%s: %v, %v after the daemon went on", a.what, a.err, a.at.Sub(resumed))
			}
		}
		for _, c := range held {
			roundTrip(t, c)
		}
	})
}

// pause stops a process and waits until it is: kill(2) returns before the other
// threads have noticed.
func pause(t testing.TB, p *os.Process) {
	t.Helper()
	p.Signal(syscall.SIGSTOP)
	stopped := func() bool {
		stats, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", p.Pid))
		for _, path := range stats {
			if b, _ := os.ReadFile(path); !strings.Contains(string(b), ") T ") {
				return false
			}
		}
		return len(stats) > 0
	}
	if !eventually(10*time.Second, stopped) {
		t.Fatalf("process %d does not stop", p.Pid)
	}
}

// expectFast opens a connection and has it say something, which takes no time. It may try
// again: the machine may have been busy with others, and the daemon is stopped all the time.
func expectFast(t testing.TB, who string, ns *topo.NS, address string) {
	t.Helper()
	const most = 500 * time.Millisecond // less than it takes to repeat a SYN
	var took time.Duration
	for range 4 {
		start := time.Now()
		c, err := ns.Dial("tcp", address, 10*time.Second)
		if err == nil {
			err = echoOnce(c)
			c.Close()
		}
		if err != nil {
			t.Errorf("%s to %s while the daemon is stopped: %v", who, address, err)
			return
		}
		if took = time.Since(start); took <= most {
			return
		}
	}
	t.Errorf("%s to %s while the daemon is stopped: after %v at last", who, address, took)
}

func echoServer(t testing.TB, ns *topo.NS, address string) string {
	t.Helper()
	return serve(t, ns, address, func(c *net.TCPConn) {
		defer c.Close()
		io.Copy(c, c)
	}).String()
}

// dialEcho opens a connection that lasts for the test.
func dialEcho(t testing.TB, ns *topo.NS, address string) net.Conn {
	t.Helper()
	c, err := ns.Dial("tcp", address, 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	roundTrip(t, c)
	return c
}

func echoOnce(c net.Conn) error {
	c.SetDeadline(time.Now().Add(10 * time.Second))
	b := []byte("x")
	if _, err := c.Write(b); err != nil {
		return err
	}
	_, err := io.ReadFull(c, b)
	return err
}
