package forward

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/pires/go-proxyproto"
	"golang.org/x/sys/unix"

	"github.com/slipway-net/slipway/internal/flow"
	"github.com/slipway-net/slipway/internal/flow/table"
	"github.com/slipway-net/slipway/internal/loop"
)

// hostDoors lead to this very namespace, with ordinary sockets.
type hostDoors struct {
	testDoors
	slow      bool                                // no socket is at hand at first
	noSockets error                               // why there is none, or nil
	dial      func(from, to netip.AddrPort) error // fails a Dial, or is nil
	// enter is what comes of an Enter, later; nil is that nobody enters.
	enter func(fd int, from, to netip.AddrPort) error
	post  func(func()) bool // the loop's, for its thread
	left  atomic.Int32      // Enters that were cancelled

	mu    sync.Mutex
	dials []string // from > to
}

func (d *hostDoors) Dial(ctx context.Context, from, to netip.AddrPort) (flow.Conn, error) {
	d.mu.Lock()
	d.dials = append(d.dials, from.String()+" > "+to.String())
	d.mu.Unlock()
	if d.dial != nil {
		if err := d.dial(from, to); err != nil {
			return nil, err
		}
	}
	return dialTCP(ctx, to)
}

func (d *hostDoors) Enters(netip.AddrPort) bool { return d.enter != nil }

func (d *hostDoors) Enter(fd int, from, to netip.AddrPort, then func(error)) (cancel func(), err error) {
	over := false
	d.post(func() {
		if err := d.enter(fd, from, to); !over && err != errNever {
			then(err)
		}
	})
	return func() {
		over = true
		d.left.Add(1)
	}, nil
}

// errNever has an Enter not end.
var errNever = errors.New("never")

func (d *hostDoors) Socket(k SocketKind, wait bool) (int, error) {
	switch {
	case d.noSockets != nil:
		return -1, d.noSockets
	case d.slow && !wait:
		return -1, ErrNoneReady
	}
	family := unix.AF_INET6
	if k == SocketTCP4 || k == SocketTransparent4 {
		family = unix.AF_INET
	}
	return unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
}

// published is a running published port.
type published struct {
	t                               *testing.T
	f                               *Forwarder
	s                               *Sockets // or nil
	tab                             *table.Table
	ln                              *net.TCPListener
	closer                          io.Closer
	clients, refused, gateway, errs atomic.Uint64
}

// publishTCP serves in on a port of the host, on the loop or not.
func publishTCP(t *testing.T, onLoop bool, listen string, in Inbound, doors Doors, tune ...func(*Forwarder)) *published {
	t.Helper()
	if c, err := net.ListenPacket("udp", anyPort); err == nil { // Go's poller opens two for good
		c.Close()
	}
	before := countFDs(t)
	p := &published{t: t, tab: table.New()}
	p.f = New(Config{Table: p.tab, Policy: NewPolicy(PolicyConfig{})})
	p.f.SetDoors(doors)
	for _, f := range tune {
		f(p.f)
	}
	stop := func() {}
	if onLoop {
		l, err := loop.New()
		if err != nil {
			t.Fatal(err)
		}
		l.Start()
		p.s = p.f.NewSockets(l)
		stop = func() {
			p.s.Close()
			l.Close()
		}
	}
	in.Count = InboundCounters{Clients: &p.clients, Refused: &p.refused, Gateway: &p.gateway, Errors: &p.errs}
	ln, err := net.Listen("tcp", listen)
	if err != nil {
		t.Fatal(err)
	}
	p.ln = ln.(*net.TCPListener)
	if p.closer, err = p.f.ServeTCP(p.ln, &in); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.closer.Close()
		p.ln.Close()
		stop()
		p.f.Close()
		if n := p.tab.Len(); n != 0 {
			t.Errorf("%d flows are left in the table", n)
		}
		if n := p.f.in.flows.len() + p.f.in.dials.len(); n != 0 {
			t.Errorf("%d flows and dials are still counted", n)
		}
		if p.s != nil && len(p.s.inbound)+len(p.s.ports)+len(p.s.pairs) != 0 {
			t.Errorf("left on the loop: %d dials, %d ports, %d pairs", len(p.s.inbound), len(p.s.ports), len(p.s.pairs))
		}
		wantFDs(t, before)
	})
	return p
}

func waitFor(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", patience, what)
		}
	}
}

// call connects to the port.
func (p *published) call() *net.TCPConn {
	p.t.Helper()
	return p.callFrom("")
}

func (p *published) callFrom(local string) *net.TCPConn {
	p.t.Helper()
	d := net.Dialer{Timeout: 10 * time.Second}
	if local != "" {
		d.LocalAddr = net.TCPAddrFromAddrPort(ap(local))
	}
	c, err := d.Dial("tcp", p.ln.Addr().String())
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(20 * time.Second))
	return c.(*net.TCPConn)
}

// wantReset connects and is reset, maybe before connect(2) has returned.
func (p *published) wantReset() {
	p.t.Helper()
	c, err := net.Dial("tcp", p.ln.Addr().String())
	if err == nil {
		defer c.Close()
		c.SetDeadline(time.Now().Add(20 * time.Second))
		err = readReset(c)
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		p.t.Errorf("the client got %v, want a reset", err)
	}
}

func readReset(c net.Conn) error {
	_, err := c.Read(make([]byte, 1))
	return err
}

// echoListener answers with the client's address in a line, and echoes.
func echoListener(t *testing.T, addr string) netip.AddrPort {
	t.Helper()
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	t.Cleanup(func() {
		ln.Close()
		all.Wait()
	})
	all.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			all.Go(func() {
				defer c.Close()
				io.WriteString(c, c.RemoteAddr().String()+"\n")
				io.Copy(struct{ io.Writer }{c}, c) // without Go's own pipes for splice(2)
			})
		}
	})
	return ln.Addr().(*net.TCPAddr).AddrPort()
}

// converse reads the line and has n bytes echoed, then the end.
func converse(t *testing.T, c *net.TCPConn, n int) (seen string) {
	t.Helper()
	want := make([]byte, n)
	rand.Read(want)
	var writer sync.WaitGroup
	defer writer.Wait()
	writer.Go(func() {
		if _, err := c.Write(want); err != nil {
			t.Errorf("write: %v", err)
		}
		c.CloseWrite()
	})
	r := bufio.NewReader(c)
	line, err := r.ReadString('\n')
	if err != nil {
		t.Errorf("read the line: %v", err)
		return ""
	}
	got, err := io.ReadAll(r)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes came back of %d (%v)", len(got), n, err)
	}
	return line[:len(line)-1]
}

// onBoth runs a test on the loop and on goroutines.
func onBoth(t *testing.T, test func(t *testing.T, onLoop bool)) {
	t.Run("loop", func(t *testing.T) { test(t, true) })
	t.Run("goroutines", func(t *testing.T) { test(t, false) })
}

const anyPort = "127.0.0.1:0"

func TestInboundServes(t *testing.T) {
	onBoth(t, func(t *testing.T, onLoop bool) {
		for _, slow := range []bool{false, true} {
			server := echoListener(t, anyPort)
			p := publishTCP(t, onLoop, anyPort, Inbound{Guest: server, Preserve: true}, &hostDoors{slow: slow})
			for _, n := range []int{0, 1, 70000, 3 << 20} {
				converse(t, p.call(), n)
			}
			c := p.call()
			if _, err := bufio.NewReader(c).ReadString('\n'); err != nil {
				t.Fatal(err)
			}
			var fl *flow.Flow
			waitFor(t, "one flow is left", func() bool {
				flows := p.tab.Snapshot()
				if len(flows) == 1 {
					fl = flows[0]
				}
				return len(flows) == 1
			})
			want := flow.Tuple{Proto: flow.TCP, Guest: server, Target: c.LocalAddr().(*net.TCPAddr).AddrPort()}
			if fl.Tuple != want || fl.Decided != flow.Published || fl.Path != flow.Kernel || fl.State() != flow.Open || fl.Reason != "" {
				t.Errorf("the flow is %+v, want %v", fl, want)
			}
			// A withdrawn port takes nobody, and leaves who is there.
			p.closer.Close()
			late := p.call() // the host's kernel answers
			p.ln.Close()
			if err := readReset(late); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("a client that was not accepted got %v", err)
			}
			io.WriteString(c, "still")
			got := make([]byte, 5)
			if _, err := io.ReadFull(c, got); err != nil || string(got) != "still" {
				t.Errorf("after the end of the port: %q, %v", got, err)
			}
			if p.clients.Load() != 5 || p.refused.Load()+p.gateway.Load()+p.errs.Load() != 0 {
				t.Errorf("%d clients, %d refused, %d as the gateway, %d errors", p.clients.Load(), p.refused.Load(), p.gateway.Load(), p.errs.Load())
			}
		}
	})
}

func TestInboundRefused(t *testing.T) {
	onBoth(t, func(t *testing.T, onLoop bool) {
		gone, err := net.Listen("tcp", anyPort)
		if err != nil {
			t.Fatal(err)
		}
		gone.Close()
		p := publishTCP(t, onLoop, anyPort, Inbound{Guest: gone.Addr().(*net.TCPAddr).AddrPort()}, &hostDoors{})
		for range 3 {
			p.wantReset()
		}
		if p.refused.Load() != 3 || p.clients.Load() != 3 {
			t.Errorf("%d of %d clients counted as refused", p.refused.Load(), p.clients.Load())
		}
	})
}

// A guest that does not answer, one address that nobody knows of, and no socket.
func TestInboundGivesUp(t *testing.T) {
	onBoth(t, func(t *testing.T, onLoop bool) {
		silent := netip.AddrPortFrom(loopback4, fullListener(t))
		p := publishTCP(t, onLoop, anyPort, Inbound{Guest: silent}, &hostDoors{}, func(f *Forwarder) {
			f.in.patience = 200 * time.Millisecond
		})
		begin := time.Now()
		p.wantReset()
		if d := time.Since(begin); d < 200*time.Millisecond || d > 5*time.Second {
			t.Errorf("reset after %v", d)
		}
		outside := publishTCP(t, onLoop, anyPort, Inbound{Guest: ap("198.51.100.9:80")}, &hostDoors{})
		outside.wantReset()
		broken := publishTCP(t, onLoop, anyPort, Inbound{Guest: silent}, &hostDoors{noSockets: unix.ENFILE})
		broken.wantReset()
		if p.refused.Load() != 1 || outside.refused.Load() != 1 || broken.refused.Load() != 1 {
			t.Errorf("refused: %d, %d, %d", p.refused.Load(), outside.refused.Load(), broken.refused.Load())
		}
	})
}

// Clients beyond the limits are reset; the others are not disturbed.
func TestInboundLimits(t *testing.T) {
	onBoth(t, func(t *testing.T, onLoop bool) {
		outgoing := &flow.Flow{Tuple: flow.Tuple{Proto: flow.TCP, Guest: netip.AddrPortFrom(loopback4, 5000)}, Decided: flow.Direct}
		silent := netip.AddrPortFrom(loopback4, fullListener(t))
		for name, tune := range map[string]func(*Forwarder){
			"dials": func(f *Forwarder) { f.in.dials = newShare[netip.AddrPort](6) }, // 4 to one port
			"flows": func(f *Forwarder) { f.in.flows = newShare[netip.Addr](6) },     // 4 of one client address
		} {
			p := publishTCP(t, onLoop, anyPort, Inbound{Guest: silent}, &hostDoors{}, tune)
			var waiting []*net.TCPConn
			for range 4 {
				waiting = append(waiting, p.call())
			}
			waitFor(t, "all wait", func() bool { return p.f.in.flows.len() == 4 })
			p.wantReset()
			if st := p.f.Stats().TCP; st.InboundLimit != 1 || p.refused.Load() != 1 {
				t.Errorf("%s: %d beyond the limits, %d refused", name, st.InboundLimit, p.refused.Load())
			}
			if !p.f.open(outgoing) {
				t.Errorf("%s: clients take the guest's room", name)
			} else {
				p.f.close(outgoing)
			}
			if another := netip.AddrPortFrom(loopback4, 1); !p.f.in.dials.take(another) {
				t.Errorf("%s: a port that does not answer keeps others from being dialled", name)
			} else {
				p.f.in.dials.give(another)
			}
			for _, c := range waiting {
				c.SetReadDeadline(time.Now().Add(time.Millisecond))
				if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("%s: one that waits: %v", name, err)
				}
			}
		}
	})
}

func TestInboundProxyHeader(t *testing.T) {
	onBoth(t, func(t *testing.T, onLoop bool) {
		server, err := net.Listen("tcp", anyPort)
		if err != nil {
			t.Fatal(err)
		}
		defer server.Close()
		p := publishTCP(t, onLoop, anyPort, Inbound{Guest: server.Addr().(*net.TCPAddr).AddrPort(), Proxy: true}, &hostDoors{})
		c := p.call()
		io.WriteString(c, "GET /\n")
		s, err := server.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		r := bufio.NewReader(s)
		h, err := proxyproto.Read(r)
		if err != nil {
			t.Fatal(err)
		}
		if h.Version != 2 || h.SourceAddr.String() != c.LocalAddr().String() || h.DestinationAddr.String() != p.ln.Addr().String() {
			t.Errorf("the header is %+v", h)
		}
		if line, err := r.ReadString('\n'); line != "GET /\n" {
			t.Errorf("behind it: %q, %v", line, err)
		}
	})
}

// Many at once, of which some are reset, and Close in the middle of it.
func TestInboundMany(t *testing.T) {
	onBoth(t, func(t *testing.T, onLoop bool) {
		server := echoListener(t, anyPort)
		p := publishTCP(t, onLoop, anyPort, Inbound{Guest: server}, &hostDoors{slow: true})
		var all sync.WaitGroup
		for i := range 200 {
			c := p.call()
			all.Go(func() {
				if i%5 == 0 {
					c.SetLinger(0)
					c.Close()
					return
				}
				converse(t, c, 10000)
			})
		}
		all.Wait()
		waitFor(t, "all flows are gone", func() bool { return p.tab.Len() == 0 })
		for range 50 {
			p.call()
		}
	})
}

// Accept errors: nothing spins, and who waits in the queue is served later.
func TestInboundWithoutDescriptors(t *testing.T) {
	onBoth(t, func(t *testing.T, onLoop bool) {
		server := echoListener(t, anyPort)
		p := publishTCP(t, onLoop, anyPort, Inbound{Guest: server}, &hostDoors{})
		converse(t, p.call(), 10) // what is opened once is open
		cmd := exec.Command("bash", "-c", `read; for fd in 11 12 13; do eval "exec $fd<>/dev/tcp/${1%:*}/${1#*:}"; done; echo connected; cat <&12 & head -c 9 <&13; kill $!`, "sh", p.ln.Addr().String())
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			missing(t, err)
		}
		var old unix.Rlimit
		if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
			t.Fatal(err)
		}
		low := old
		low.Cur = 200
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &low); err != nil {
			t.Fatal(err)
		}
		defer unix.Setrlimit(unix.RLIMIT_NOFILE, &old)
		var taken []int
		for {
			fd, err := unix.FcntlInt(uintptr(1), unix.F_DUPFD_CLOEXEC, 0)
			if err != nil {
				break
			}
			taken = append(taken, fd)
		}
		begin := time.Now()
		io.WriteString(in, "go\n")
		r := bufio.NewReader(out)
		if line, err := r.ReadString('\n'); line != "connected\n" {
			t.Errorf("%q, %v", line, err)
		}
		waitFor(t, "accept fails again and again", func() bool { return p.errs.Load() >= 4 })
		if d, rests := time.Since(begin), (1+2+4)*restFirst; p.errs.Load() == 4 && d < rests {
			t.Errorf("4 accepts failed within %v, which rest for %v in between", d, rests)
		}
		for _, fd := range taken {
			unix.Close(fd)
		}
		if b, err := io.ReadAll(r); err != nil || !bytes.Contains(b, []byte("127.0.0.1")) {
			t.Errorf("then it had %q, %v", b, err)
		}
		in.Close()
		cmd.Wait()
		waitFor(t, "they are gone", func() bool { return p.tab.Len() == 0 })
		converse(t, p.call(), 10)
	})
}

// inboundHosts are the addresses of the namespace in which TestInboundWays runs.
const inboundHosts = `
ip link set lo up
for a in 192.168.65.1 192.168.65.3 172.17.0.2 198.51.100.7 10.9.0.7; do ip addr add $a/32 dev lo; done
for a in fdc4:f303:9324::1 fdc4:f303:9324::3 2001:db8::7; do ip -6 addr add $a/128 dev lo nodad; done`

// TestInboundWays: every way, and what is tried when one is not open. All addresses are
// of one namespace, where anybody may have the gateway's.
func TestInboundWays(t *testing.T) {
	if !inChild(t) {
		return
	}
	if out, err := exec.Command("sh", "-ec", inboundHosts).CombinedOutput(); err != nil {
		missing(t, errors.New(string(out)))
	}
	waitFor(t, "IPv6 is there", func() bool {
		for _, a := range []string{"[::1]:9", "[fdc4:f303:9324::1]:9", "[fdc4:f303:9324::3]:9", "[2001:db8::7]:9"} {
			// There is a route soon, and one that takes packets in later.
			if _, err := net.DialTimeout("tcp", a, 100*time.Millisecond); !errors.Is(err, syscall.ECONNREFUSED) {
				return false
			}
		}
		return true
	})
	inUse := func(from, _ netip.AddrPort) error {
		if from.Port() != 0 {
			return &DialError{Err: syscall.EADDRINUSE}
		}
		return nil
	}
	const other, other6 = "198.51.100.7:0", "[2001:db8::7]:0"
	refused := func(netip.AddrPort, netip.AddrPort) error { return &DialError{Err: syscall.ECONNREFUSED} }
	own, own6 := Inbound{Guest: ap("192.168.65.3:8080"), Wildcard: true, Preserve: true}, Inbound{Guest: ap("[fdc4:f303:9324::3]:8080"), Wildcard: true, Preserve: true}
	either := func(in *Inbound) { in.Either = true }
	either4, either6 := with(own, either), with(own6, either)
	for _, c := range []struct {
		name    string
		in      Inbound
		server  string // in.Guest where it is empty
		client  string // where it dials from
		doors   *hostDoors
		seen    string // by the server, where a socket was connected
		dial    string // the last by the wire; "client" is its address
		gateway uint64
	}{
		{"transparent", own, "", "", &hostDoors{}, "192.168.65.1", "", 0},
		{"transparent, IPv6", own6, "", "", &hostDoors{}, "fdc4:f303:9324::1", "", 0},
		{"wire", own, "", other, &hostDoors{}, "", "client > 192.168.65.3:8080", 0},
		{"wire, IPv6", own6, "", other6, &hostDoors{}, "", "client > [fdc4:f303:9324::3]:8080", 0},
		{"routed inside", own, "", "10.9.0.7:0", &hostDoors{}, "192.168.65.1", "", 1},
		{"client's port in use", own, "", other, &hostDoors{dial: inUse}, "", "192.168.65.1:0 > 192.168.65.3:8080", 1},
		{"no transparent sockets", own, "", "", &hostDoors{noSockets: unix.EMFILE}, "", "192.168.65.1:0 > 192.168.65.3:8080", 0},
		{"not direct", Inbound{Guest: ap("172.17.0.2:8080"), Preserve: true}, "", other, &hostDoors{}, "192.168.65.1", "", 1},
		{"server of IPv4, loopback", either6, own.Guest.String(), "", &hostDoors{}, "192.168.65.1", "", 0},
		{"server of IPv6, loopback", either4, own6.Guest.String(), "", &hostDoors{}, "fdc4:f303:9324::1", "", 0},
		{"server of IPv4", either6, own.Guest.String(), other6, &hostDoors{dial: refused}, "192.168.65.1", "client > [fdc4:f303:9324::3]:8080", 1},
		{"server of IPv6", either4, own6.Guest.String(), other, &hostDoors{dial: refused}, "fdc4:f303:9324::1", "client > 192.168.65.3:8080", 1},
	} {
		onBoth(t, func(t *testing.T, onLoop bool) {
			server := echoListener(t, cmp.Or(c.server, c.in.Guest.String()))
			doors := &hostDoors{dial: c.doors.dial, noSockets: c.doors.noSockets}
			doors.testDoors = *dockerDoors(true)
			doors.listens = []netip.AddrPort{server}
			listen := "198.51.100.7:0"
			switch {
			case c.client == "" && c.in.Guest.Addr().Is6():
				listen = "[::1]:0"
			case c.client == "":
				listen = anyPort
			case c.in.Guest.Addr().Is6():
				listen = other6
			}
			p := publishTCP(t, onLoop, listen, c.in, doors)
			conn := p.callFrom(c.client)
			seen := ap(converse(t, conn, 100000)).Addr().String()
			if c.seen != "" && seen != c.seen {
				t.Errorf("%s: seen as %s, want %s", c.name, seen, c.seen)
			}
			want := c.dial
			if rest, ok := bytes.CutPrefix([]byte(want), []byte("client")); ok {
				want = conn.LocalAddr().String() + string(rest)
			}
			doors.mu.Lock()
			defer doors.mu.Unlock()
			last := ""
			if n := len(doors.dials); n > 0 {
				last = doors.dials[n-1]
			}
			if last != want {
				t.Errorf("%s: dialled %q, want %q", c.name, doors.dials, want)
			}
			if n := p.gateway.Load(); n != c.gateway {
				t.Errorf("%s: %d counted as seen as the gateway, want %d", c.name, n, c.gateway)
			}
		})
	}
}

// A client by the wire whose place a socket takes; and what is done where none can.
func TestInboundEnters(t *testing.T) {
	if !inChild(t) {
		return
	}
	if out, err := exec.Command("sh", "-ec", inboundHosts).CombinedOutput(); err != nil {
		missing(t, errors.New(string(out)))
	}
	in := Inbound{Guest: ap("192.168.65.3:8080"), Wildcard: true, Preserve: true}
	echoListener(t, in.Guest.String())
	connect := func(fd int, _, to netip.AddrPort) error {
		unix.SetNonblock(fd, false)
		defer unix.SetNonblock(fd, true)
		return unix.Connect(fd, sockaddr(to))
	}
	fails := func(err error) func(int, netip.AddrPort, netip.AddrPort) error {
		return func(int, netip.AddrPort, netip.AddrPort) error { return err }
	}
	serve := func(t *testing.T, enter func(int, netip.AddrPort, netip.AddrPort) error, slow bool, tune ...func(*Forwarder)) (*published, *hostDoors) {
		doors := &hostDoors{enter: enter, slow: slow}
		doors.testDoors = *dockerDoors(true)
		p := publishTCP(t, true, "198.51.100.7:0", in, doors, tune...)
		p.s.loop.Do(func() { doors.post = p.s.loop.Post })
		return p, doors
	}
	for _, c := range []struct {
		name    string
		err     error
		dial    string
		gateway uint64
	}{
		{"entered", nil, "", 0},
		{"no entry", ErrNoEntry, "client > 192.168.65.3:8080", 0},
		{"in use", &DialError{Err: syscall.EADDRINUSE}, "192.168.65.1:0 > 192.168.65.3:8080", 1},
	} {
		for _, slow := range []bool{false, true} {
			enter := fails(c.err)
			if c.err == nil {
				enter = connect
			}
			p, doors := serve(t, enter, slow)
			conn := p.callFrom("198.51.100.7:0")
			own := conn.LocalAddr().String()
			if _, err := conn.Read(make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			flows := p.tab.Snapshot()
			if len(flows) != 1 || (flows[0].Path == flow.Kernel) != (c.err == nil) {
				t.Errorf("%s: the flows are %+v", c.name, flows)
			}
			if c.err == nil {
				p.s.loop.Do(func() {
					if !p.s.Live(flows[0].Tuple) {
						t.Errorf("%s: it is not known", c.name)
					}
				})
			}
			converse(t, conn, 100000)
			doors.mu.Lock()
			want := c.dial
			if rest, ok := bytes.CutPrefix([]byte(want), []byte("client")); ok {
				want = own + string(rest)
			}
			if want == "" && len(doors.dials) > 0 || want != "" && (len(doors.dials) != 1 || doors.dials[0] != want) {
				t.Errorf("%s: dialled %q, want %q", c.name, doors.dials, want)
			}
			doors.mu.Unlock()
			if n := p.gateway.Load(); n != c.gateway {
				t.Errorf("%s: %d counted as seen as the gateway, want %d", c.name, n, c.gateway)
			}
		}
	}
	for name, err := range map[string]error{"refused": syscall.ECONNREFUSED, "silent": errNever} {
		p, doors := serve(t, fails(err), false, func(f *Forwarder) { f.in.patience = time.Second })
		p.wantReset()
		if n := doors.left.Load(); p.refused.Load() != 1 || n != 0 && err != errNever || n != 1 && err == errNever || len(doors.dials) != 0 {
			t.Errorf("%s: %d refused, %d cancelled, dialled %q", name, p.refused.Load(), n, doors.dials)
		}
	}
}
