package dockerproxy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/slipway-net/slipway/internal/api"
	"github.com/slipway-net/slipway/internal/flow"
)

// The tests play dockerd and the daemon; the proxy is this binary, started again under
// the name of one.
func TestMain(m *testing.M) {
	if IsProxy(os.Args[0]) {
		os.Exit(Main(os.Args, "test"))
	}
	goleak.VerifyTestMain(m)
}

// missing is called when this machine lacks what a test needs.
func missing(t *testing.T, why string) {
	t.Helper()
	if os.Getenv("NETNS_TESTS") == "require" {
		t.Fatal("this machine lacks what the test needs: " + why)
	}
	t.Skip("this machine lacks what the test needs: " + why)
}

// host is the daemon behind guest.sock: its ports listen nowhere.
type host struct {
	path string

	mu     sync.Mutex // guards the fields below
	refuse func(flow.PortSpec) error
	last   uint64
	ports  map[uint64]flow.PortSpec
	asked  int
}

func (h *host) Info() api.Info                   { return api.NewInfo() }
func (h *host) Ports(context.Context) []api.Port { return nil }
func (h *host) NetNS() string                    { return "/proc/self/ns/net" }

func (h *host) AddPort(_ context.Context, _ string, s flow.PortSpec) (api.Port, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.asked++
	if h.refuse != nil {
		if err := h.refuse(s); err != nil {
			return api.Port{}, err
		}
	}
	h.last++
	h.ports[h.last] = s
	return api.Port{ID: h.last, Spec: api.SpecOf(s)}, nil
}

func (h *host) RemovePort(id uint64) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.ports, id)
	return nil
}

// refuses has f decide from now on.
func (h *host) refuses(f func(flow.PortSpec) error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.refuse = f
}

// published are the ports at this moment.
func (h *host) published() (specs []flow.PortSpec) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, s := range h.ports {
		specs = append(specs, s)
	}
	return specs
}

// newHost is a daemon that runs until the test ends.
func newHost(t *testing.T) *host {
	h := &host{path: filepath.Join(t.TempDir(), "guest.sock"), ports: map[uint64]flow.PortSpec{}}
	t.Cleanup(h.run(t))
	return h
}

// run serves guest.sock until the caller calls stop.
func (h *host) run(t *testing.T) (stop func()) {
	t.Helper()
	os.Remove(h.path)
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: h.path})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- api.NewGuestServer(h, nil).Serve(ctx, ln) }()
	return sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// process is a running proxy.
type process struct {
	*exec.Cmd
	stderr bytes.Buffer
	status string // what dockerd read
}

// run starts a proxy as dockerd does, with a socket for descriptor 4 or none, and waits
// for its status.
func run(t *testing.T, sock string, listener *os.File, args ...string) *process {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	p := &process{Cmd: &exec.Cmd{Path: "/proc/self/exe", Args: append([]string{Name}, args...), ExtraFiles: []*os.File{w}}}
	p.Stderr = &p.stderr
	p.Env = environment(sock)
	if listener != nil {
		p.ExtraFiles = append(p.ExtraFiles, listener)
		p.Args = append(p.Args, "-use-listen-fd")
	}
	p.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	err = p.Start()
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if p.ProcessState == nil {
			p.Process.Kill()
			p.Wait()
		}
		if t.Failed() {
			t.Logf("%q said %q", p.Args, &p.stderr)
		}
	})
	r.SetReadDeadline(time.Now().Add(16 * time.Second))
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatalf("status of %q: %v", p.Args, err)
	}
	p.status = string(b)
	return p
}

// environment is a proxy's. The race detector would have each end a second later.
func environment(sock string) []string {
	return append(os.Environ(), EnvSocket+"="+sock, "GORACE=atexit_sleep_ms=0")
}

// end sends a signal and returns the exit status.
func (p *process) end(t *testing.T, s os.Signal) int {
	t.Helper()
	if err := p.Process.Signal(s); err != nil {
		t.Error(err)
	}
	return p.wait(t)
}

func (p *process) wait(t *testing.T) int {
	t.Helper()
	dead := time.AfterFunc(30*time.Second, func() { p.Process.Kill() })
	defer dead.Stop()
	var exit *exec.ExitError
	if err := p.Wait(); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return p.ProcessState.ExitCode()
}

// words is a command line of dockerd's.
func words(proto flow.Proto, listen, container netip.AddrPort) []string {
	return []string{
		"-proto", proto.String(),
		"-host-ip", listen.Addr().String(), "-host-port", strconv.Itoa(int(listen.Port())),
		"-container-ip", container.Addr().String(), "-container-port", strconv.Itoa(int(container.Port())),
	}
}

// bound is a socket as dockerd binds it for descriptor 4, and where it is.
func bound(t *testing.T, proto flow.Proto, at netip.Addr) (*os.File, netip.AddrPort) {
	t.Helper()
	var l io.Closer
	var a net.Addr
	var f *os.File
	if proto == flow.TCP {
		ln, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(at, 0)))
		if err != nil {
			missing(t, err.Error())
		}
		l, a = ln, ln.Addr()
		f, err = ln.File()
		if err != nil {
			t.Fatal(err)
		}
	} else {
		c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(at, 0)))
		if err != nil {
			missing(t, err.Error())
		}
		l, a = c, c.LocalAddr()
		f, err = c.File()
		if err != nil {
			t.Fatal(err)
		}
	}
	l.Close()
	t.Cleanup(func() { f.Close() })
	return f, ap(a.String())
}

// free is a port that nobody listens on. Of TCP's it is kept for those who name it: the kernel
// gives it to nobody, and who binds it with SO_REUSEADDR, as package net does, gets it.
func free(t *testing.T, proto flow.Proto, at netip.Addr) netip.AddrPort {
	t.Helper()
	if proto == flow.UDP {
		f, a := bound(t, proto, at)
		f.Close()
		return a
	}
	family, sa := unix.AF_INET6, unix.Sockaddr(&unix.SockaddrInet6{Addr: at.As16()})
	if at.Is4() {
		family, sa = unix.AF_INET, &unix.SockaddrInet4{Addr: at.As4()}
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		t.Fatal(err)
	}
	if err := unix.Bind(fd, sa); err != nil {
		missing(t, err.Error())
	}
	sa, err = unix.Getsockname(fd)
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(at, uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(at, uint16(sa.Port))
	}
	t.Fatal(err)
	return netip.AddrPort{}
}

// echo is a container: a server on loopback, until the test ends.
func echo(t *testing.T, proto flow.Proto, at netip.Addr) netip.AddrPort {
	t.Helper()
	f, a := bound(t, proto, at)
	var served sync.WaitGroup
	var closer io.Closer
	if proto == flow.TCP {
		ln, err := net.FileListener(f)
		if err != nil {
			t.Fatal(err)
		}
		closer = ln
		served.Go(func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				served.Go(func() { defer c.Close(); io.Copy(c, c) })
			}
		})
	} else {
		c, err := net.FilePacketConn(f)
		if err != nil {
			t.Fatal(err)
		}
		closer = c
		served.Go(func() {
			b := make([]byte, 65535)
			for {
				n, from, err := c.ReadFrom(b)
				if err != nil {
					return
				}
				c.WriteTo(b[:n], from)
			}
		})
	}
	f.Close()
	t.Cleanup(func() { closer.Close(); served.Wait() })
	return a
}

// says sends text to a port and returns the answer.
func says(t *testing.T, proto flow.Proto, to netip.AddrPort, text string) string {
	t.Helper()
	c, err := net.Dial(proto.String(), to.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, len(text))
	if _, err := io.ReadFull(c, b); err != nil {
		t.Fatalf("answer of %v: %v", to, err)
	}
	return string(b)
}

// eventually polls until ok, for at most 30 seconds.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(30 * time.Second); !ok(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatalf("not within 30 s: %s", what)
		}
	}
}

var (
	loopback4 = netip.MustParseAddr("127.0.0.1")
	loopback6 = netip.MustParseAddr("::1")
)

// TestContract plays dockerd: start, use, stop, with and without a socket of dockerd's.
func TestContract(t *testing.T) {
	for _, proto := range []flow.Proto{flow.TCP, flow.UDP} {
		for _, at := range []netip.Addr{loopback4, loopback6} {
			for _, passed := range []bool{false, true} {
				for _, signal := range []os.Signal{os.Interrupt, syscall.SIGTERM} {
					name := strings.Join([]string{proto.String(), at.String(), strconv.FormatBool(passed), signal.String()}, "_")
					t.Run(name, func(t *testing.T) { testContract(t, proto, at, passed, signal) })
				}
			}
		}
	}
}

func testContract(t *testing.T, proto flow.Proto, at netip.Addr, passed bool, signal os.Signal) {
	h := newHost(t)
	container := echo(t, proto, at)
	var f *os.File
	var listen netip.AddrPort
	if passed {
		f, listen = bound(t, proto, at)
	} else {
		listen = free(t, proto, at)
	}
	p := run(t, h.path, f, words(proto, listen, container)...)
	if p.status != "0\n" {
		t.Fatalf("status %q, want 0", p.status)
	}
	want := flow.PortSpec{Proto: proto, Host: listen, Guest: netip.AddrPortFrom(netip.Addr{}, listen.Port()), Behind: container}
	if got := h.published(); !slices.Equal(got, []flow.PortSpec{want}) {
		t.Errorf("published are %+v, want %+v", got, want)
	}
	if got := says(t, proto, listen, "over and back"); got != "over and back" {
		t.Errorf("the answer inside is %q", got)
	}
	if code := p.end(t, signal); code != 0 {
		t.Errorf("exit status %d after %v", code, signal)
	}
	if got := h.published(); len(got) > 0 {
		t.Errorf("%+v are published after the end", got)
	}
}

// TestKilled: a proxy that has no chance to withdraw leaves nothing behind.
func TestKilled(t *testing.T) {
	h := newHost(t)
	p := run(t, h.path, nil, words(flow.TCP, free(t, flow.TCP, loopback4), ap("127.0.0.1:9"))...)
	if len(h.published()) != 1 {
		t.Fatalf("status %q, published %v", p.status, h.published())
	}
	p.end(t, os.Kill)
	eventually(t, "nothing is published", func() bool { return len(h.published()) == 0 })
}

// TestRefused: what dockerd's user gets to read.
func TestRefused(t *testing.T) {
	h := newHost(t)
	h.refuses(func(s flow.PortSpec) error {
		return &api.Error{Message: "publish " + s.Host.String() + ": port is taken by nginx (pid 812)", Hint: "stop it", Status: http.StatusConflict}
	})
	listen := free(t, flow.TCP, loopback4)
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	stream, at := bound(t, flow.TCP, loopback4)
	tests := []struct {
		name string
		fd   *os.File
		sock string
		args []string
		want string
	}{
		{"host_conflict", nil, h.path, words(flow.TCP, listen, ap("127.0.0.1:9")),
			"publish " + listen.String() + ": port is taken by nginx (pid 812) (hint: stop it)"},
		{"conflict_inside", nil, h.path, words(flow.TCP, ap(taken.Addr().String()), ap("127.0.0.1:9")),
			fmt.Sprintf("listen on %v/tcp in the engine: port %d is taken by ", taken.Addr(), ap(taken.Addr().String()).Port())},
		{"sctp", nil, h.path, []string{"-proto", "sctp", "-host-ip", "0.0.0.0", "-host-port", "1", "-container-ip", "127.0.0.1", "-container-port", "9"},
			"sctp cannot be published: slipway carries tcp and udp"},
		{"nonsense", nil, h.path, []string{"-host-port", "0"}, "-host-port 0: must be in 1..65535"},
		{"no_descriptor", nil, h.path, append(words(flow.TCP, listen, ap("127.0.0.1:9")), "-use-listen-fd"),
			"listen on " + listen.String() + "/tcp in the engine: descriptor 4: "},
		{"wrong_descriptor", stream, h.path, words(flow.UDP, at, ap("127.0.0.1:9")),
			"listen on " + at.String() + "/udp in the engine: "},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := run(t, tt.sock, tt.fd, tt.args...)
			if !strings.HasPrefix(p.status, "1\n"+tt.want) || strings.Count(p.status, "\n") != 1 {
				t.Errorf("status %q, want 1 and one line with %q", p.status, tt.want)
			}
			if code := p.wait(t); code != 1 {
				t.Errorf("exit status %d", code)
			}
			if got := h.published(); len(got) > 0 {
				t.Errorf("published: %+v", got)
			}
		})
	}
}

// TestUnpublished: without guest.sock it is dockerd's own proxy.
func TestUnpublished(t *testing.T) {
	container, listen := echo(t, flow.TCP, loopback4), free(t, flow.TCP, loopback4)
	p := run(t, "", nil, words(flow.TCP, listen, container)...)
	if got := says(t, flow.TCP, listen, "hello"); p.status != "0\n" || got != "hello" {
		t.Errorf("status %q, answer %q", p.status, got)
	}
	p.end(t, os.Interrupt)
	if !strings.Contains(p.stderr.String(), "not published on the host: SLIPWAY_SOCK is not set") {
		t.Errorf("it says %q", &p.stderr)
	}
}

// TestForeignAddress: one of the host's that is not of this namespace.
func TestForeignAddress(t *testing.T) {
	h := newHost(t)
	container, listen := echo(t, flow.TCP, loopback4), ap("192.0.2.7:8080")
	p := run(t, h.path, nil, words(flow.TCP, listen, container)...)
	if got := h.published(); p.status != "0\n" || len(got) != 1 || got[0].Host != listen || got[0].Behind != container {
		t.Errorf("status %q, published %+v", p.status, got)
	}
	if code := p.end(t, os.Interrupt); code != 0 {
		t.Errorf("exit status %d", code)
	}
	if b, _ := os.ReadFile("/proc/sys/net/ipv4/ip_nonlocal_bind"); strings.TrimSpace(string(b)) != "0" {
		missing(t, "net.ipv4.ip_nonlocal_bind=0")
	}
	p = run(t, "", nil, words(flow.TCP, listen, container)...)
	if !strings.HasPrefix(p.status, "1\nlisten on 192.0.2.7:8080/tcp in the engine: cannot assign") {
		t.Errorf("status without publishing %q", p.status)
	}
	p.wait(t)
}

// TestOwnAddress: one of the namespace's, such as a bridge's, is no business of the host.
func TestOwnAddress(t *testing.T) {
	list, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(list, func(a net.Addr) bool {
		p := netip.MustParsePrefix(a.String())
		return p.Addr().Is4() && !p.Addr().IsLoopback()
	})
	if i < 0 {
		missing(t, "an IPv4 address that is no loopback")
	}
	h := newHost(t)
	container, listen := echo(t, flow.TCP, loopback4), free(t, flow.TCP, netip.MustParsePrefix(list[i].String()).Addr())
	p := run(t, h.path, nil, words(flow.TCP, listen, container)...)
	if got := says(t, flow.TCP, listen, "hello"); p.status != "0\n" || got != "hello" || len(h.published()) != 0 {
		t.Errorf("status %q, answer %q, published %v", p.status, got, h.published())
	}
	p.end(t, os.Interrupt)
}

// TestDaemonRestarts: inside goes on, and the port is published again, even if somebody
// else has it for a while.
func TestDaemonRestarts(t *testing.T) {
	h := newHost(t)
	stop := h.run(t) // in place of newHost's own socket
	container, listen := echo(t, flow.TCP, loopback4), free(t, flow.TCP, loopback4)
	p := run(t, h.path, nil, words(flow.TCP, listen, container)...)
	if len(h.published()) != 1 {
		t.Fatalf("status %q, published %v", p.status, h.published())
	}
	stop()
	if n := len(h.published()); n != 0 {
		t.Errorf("%d ports without a connection", n)
	}
	if got := says(t, flow.TCP, listen, "hello"); got != "hello" {
		t.Errorf("the answer inside is %q", got)
	}
	taken := true
	h.refuses(func(flow.PortSpec) error {
		if taken {
			taken = false
			return &api.Error{Message: "port 8080 is taken", Status: http.StatusConflict}
		}
		return nil
	})
	defer h.run(t)()
	eventually(t, "it is published again", func() bool { return len(h.published()) == 1 })
	if code := p.end(t, os.Interrupt); code != 0 {
		t.Errorf("exit status %d", code)
	}
	if text := p.stderr.String(); !strings.Contains(text, "port 8080 is taken") {
		t.Errorf("it said %q", text)
	}
}

// TestDockerdGone: a status that nobody reads ends the proxy, and with it the port.
func TestDockerdGone(t *testing.T) {
	h := newHost(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	defer w.Close()
	p := &process{Cmd: &exec.Cmd{
		Path: "/proc/self/exe", Args: append([]string{Name}, words(flow.TCP, free(t, flow.TCP, loopback4), ap("127.0.0.1:9"))...),
		ExtraFiles: []*os.File{w}, Env: environment(h.path),
	}}
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	p.wait(t)
	left := h.published()
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.asked != 1 || len(left) != 0 {
		t.Errorf("asked %d times, left %v", h.asked, left)
	}
}
