package test

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/slipway-net/slipway/test/topo"
	"golang.org/x/sys/unix"
)

// Published ports whose sockets a service manager opened: a shell that says so, and
// systemd's own systemd-socket-activate, which needs no systemd that runs.

// TestPublishInherited: a socket that the service manager opened is used, also where
// slipway could not open it itself.
func TestPublishInherited(t *testing.T) {
	needPublish(t)
	eachUser(t, func(t *testing.T, n *topo.Topology, u user) {
		l, err := n.Host.Listen("127.0.0.1:80")
		if err != nil {
			t.Fatal(err)
		}
		file, err := l.(*net.TCPListener).File()
		l.Close()
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		raw, err := file.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		var socket unix.Stat_t
		raw.Control(func(fd uintptr) { err = unix.Fstat(int(fd), &socket) })
		if err != nil {
			t.Fatal(err)
		}
		e := &engine{user: u, name: newName(), net: n, done: make(chan struct{})}
		e.before = snapshot(t, n)
		run := u.slipway("run", "--name", e.name, "-p", "127.0.0.1:80:81", "--", "sh", "-c", "echo $$; readlink /proc/self/ns/net; exec cat")
		e.cmd = exec.Command(lookPath(t, "sh"), append([]string{"-c", `LISTEN_PID=$$ LISTEN_FDS=2 exec "$@"`, "sh"}, run.Args...)...)
		u.dress(e.cmd)
		e.cmd.ExtraFiles = []*os.File{file, file} // the second is for nobody
		e.follow(t)
		file.Close()
		tellSource(t, e.guest, enginePort)
		expectListeners(t, n, "inherited", []string{"tcp 127.0.0.1:80"})
		reach(t, n, "tcp", 80)
		var pids []string
		if !eventually(10*time.Second, func() bool { pids = holders(t, socket.Ino); return len(pids) == 1 }) {
			t.Errorf("processes %v have the socket, want slipway alone", pids)
		}
		if r := e.exec(t, "sh", "-c", "echo $LISTEN_FDS$LISTEN_PID; ls /proc/self/fd"); strings.TrimSpace(strings.Split(r.stdout, "\n")[0]) != "" {
			t.Errorf("the command has LISTEN_FDS, too: %s", r.stdout)
		}
	})
}

// holders lists the processes that have a socket.
func holders(t *testing.T, inode uint64) (pids []string) {
	t.Helper()
	fds, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if name, _ := os.Readlink(fd); name == fmt.Sprintf("socket:[%d]", inode) {
			if pid := strings.Split(fd, "/")[2]; !slices.Contains(pids, pid) {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

// activation is what a socket unit says, and what comes of it.
type activation struct {
	name   string
	proto  string
	listen []string // ListenStream= or ListenDatagram=
	only   bool     // BindIPv6Only=ipv6-only; both is the default
	spec   string   // of -p
	want   []string // what listens, without the protocol
}

// activations are port 80 in every way that systemd has for it.
func activations() (all []activation) {
	for _, proto := range []string{"tcp", "udp"} {
		for _, a := range []activation{
			{name: "both", listen: []string{"80"}, spec: "80:81", want: []string{"*:80"}},
			{name: "IPv4", listen: []string{"0.0.0.0:80"}, spec: "0.0.0.0:80:81", want: []string{"0.0.0.0:80"}},
			{name: "IPv6", listen: []string{"[::]:80"}, only: true, spec: "[::]:80:81", want: []string{"[::]:80"}},
			{name: "two", listen: []string{"0.0.0.0:80", "[::]:80"}, only: true, spec: "80:81", want: []string{"0.0.0.0:80", "[::]:80"}},
		} {
			a.name, a.proto, a.spec = proto+" "+a.name, proto, a.spec+"/"+proto
			for i, w := range a.want {
				a.want[i] = proto + " " + w
			}
			all = append(all, a)
		}
	}
	return all
}

// command is run as systemd starts it, once wake has sent it a client.
func (a activation) command(t testing.TB, n *topo.Topology, u user, run *exec.Cmd) *exec.Cmd {
	t.Helper()
	// systemd-socket-activate has no option for BindIPv6Only=.
	if err := n.Host.Sysctl("net.ipv6.bindv6only", map[bool]string{true: "1", false: "0"}[a.only]); err != nil {
		t.Fatal(err)
	}
	var args []string
	if a.proto == "udp" {
		args = append(args, "--datagram")
	}
	for _, l := range a.listen {
		args = append(args, "--listen", l)
	}
	for _, v := range run.Env {
		args = append(args, "--setenv", v)
	}
	if u.rootless && isRoot() { // User=
		id := fmt.Sprint(ordinaryUser)
		args = append(args, "setpriv", "--reuid", id, "--regid", id, "--clear-groups")
	}
	cmd := exec.Command(lookPath(t, "systemd-socket-activate"), append(args, run.Args...)...)
	user{}.dress(cmd)
	return cmd
}

// wake is a client that comes once there is a socket.
func (a activation) wake(t testing.TB, n *topo.Topology) {
	expectListeners(t, n, "systemd-socket-activate", a.want)
	c, err := n.Host.Dial(a.proto, net.JoinHostPort(map[bool]string{true: "::1", false: "127.0.0.1"}[a.listen[0] == "[::]:80"], "80"), 0)
	if err != nil {
		t.Error(err)
		return
	}
	defer c.Close()
	c.Write([]byte("wake up"))
}

// TestPublishActivated: sockets of systemd, of either family and of both, also for a user
// who could not open them.
func TestPublishActivated(t *testing.T) {
	needPublish(t, "systemd-socket-activate", "setpriv")
	eachUser(t, func(t *testing.T, n *topo.Topology, u user) {
		for _, a := range activations() {
			t.Run(a.name, func(t *testing.T) {
				e := &engine{user: u, name: newName(), net: n, done: make(chan struct{})}
				e.before = snapshot(t, n)
				e.cmd = a.command(t, n, u, u.slipway("run", "--name", e.name, "-p", a.spec, "--", "sh", "-c", "echo $$; readlink /proc/self/ns/net; exec cat"))
				group := newGroup(t)
				group.Go(func() { a.wake(t, n) })
				e.follow(t)
				tellSource(t, e.guest, enginePort)
				expectListeners(t, n, "activated", a.want)
				a.expectSources(t, n)
				if out := e.exec(t, "env").stdout; strings.Contains(out, "LISTEN_") {
					t.Errorf("the command has LISTEN_FDS, too: %s", out)
				}
				e.end(t)
				expectListeners(t, n, "after the end")
			})
		}
	})
}

// expectSources asks from every place that the sockets have clients at.
func (a activation) expectSources(t *testing.T, n *topo.Topology) {
	t.Helper()
	for _, f := range families {
		dual := a.want[0] == a.proto+" *:80"
		if !dual && !slices.Contains(a.want, fmt.Sprintf("%s %s:80", a.proto, inBrackets(anyOf(f)))) {
			continue
		}
		loopback, own, other := clientsOf(n, f)
		for _, c := range []client{loopback, own, other} {
			want, family, to := "client", f, hostOf(f)
			if c.from.IsLoopback() {
				want, to = "gateway", c.from
			}
			if dual && f.v6 {
				want, family = "gateway", families[0]
			}
			s, err := c.ask(a.proto, netip.AddrPortFrom(to, 80))
			if problem := s.differs(want, family); err != nil || problem != "" {
				t.Errorf("%s, from %s: %s %v", f.name, c.name, problem, err)
			}
		}
	}
}
