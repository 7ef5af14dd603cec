package nsagent

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func init() {
	guestTests = append(guestTests,
		guestTest{"inbound_connects", testInboundConnects},
		guestTest{"inbound_marks", testInboundMarks},
		guestTest{"inbound_forged", testInboundForged},
		guestTest{"inbound_where", testInboundWhere},
		guestTest{"inbound_listens", testInboundListens},
		guestTest{"inbound_listens_unknown", testInboundListensUnknown},
		guestTest{"inbound_sockets", testInboundSockets},
		guestTest{"inbound_segments", testInboundSegments},
	)
}

// serverRole serves TCP on port 80: the client's address in a line, and then an echo.
func serverRole() {
	ln, err := net.Listen("tcp", ":80")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println("ready")
	for {
		c, err := ln.Accept()
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		go func() {
			defer c.Close()
			fmt.Fprintln(c, netip.MustParseAddrPort(c.RemoteAddr().String()).Addr().Unmap())
			io.Copy(c, c)
		}()
	}
}

// dockerRules are in the manner of Docker: who asks the namespace's own addresses for
// port 8080 gets the container, and nobody else from outside gets in, not even when it
// knows the container's address.
const dockerRules = `
docker() { # command, container, container:port, loopback
	$1 -t nat -N DOCKER
	$1 -t nat -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
	$1 -t nat -A OUTPUT ! -d $4 -m addrtype --dst-type LOCAL -j DOCKER
	$1 -t nat -A POSTROUTING -m addrtype --src-type LOCAL -o v0 -j MASQUERADE
	$1 -t nat -A DOCKER ! -i v0 -p tcp --dport 8080 -j DNAT --to-destination $3
	$1 -t raw -A PREROUTING -d $2 ! -i v0 -j DROP
	$1 -P FORWARD DROP
	$1 -A INPUT -i lo -j ACCEPT
	$1 -A INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
	$1 -A INPUT -p ipv6-icmp -j ACCEPT 2>/dev/null || :
	$1 -A INPUT -j DROP
}
nsenter -t $pid -n ip link set lo up # else Go has no IPv6
docker iptables 172.17.0.2 172.17.0.2:80 127.0.0.0/8
docker ip6tables fd00:17::2 [fd00:17::2]:80 ::1
for d in all default lo v0; do echo 1 >/proc/sys/net/ipv4/conf/$d/rp_filter; done
`

// serve starts a server in the guest, or in a container with the process pid.
func serve(t *testing.T, g *testGuest, pid string) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Open(selfExe) // whose name others may not follow
	if err != nil {
		t.Fatal(err)
	}
	defer self.Close()
	const stdin = "/proc/self/fd/0"
	args := []string{"env", stdin}
	if pid != "" {
		args = []string{"nsenter", "-t", pid, "-n", stdin}
	}
	_, err = g.Exec(t.Context(), Command{Args: args, Env: append(os.Environ(), envRole+"=server"), Stdin: self, Stdout: w, Stderr: os.Stderr})
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if line, err := bufio.NewReader(r).ReadString('\n'); err != nil {
		t.Fatalf("the server said %q: %v", line, err)
	}
}

// inboundTargets are what published ports lead to, where there are makeContainer and
// dockerRules.
var inboundTargets = []struct {
	name, to string
	answered bool
}{
	{"own", "192.168.65.3:80", true},
	{"own, IPv6", "[fdc4:f303:9324::3]:80", true},
	{"DNAT", "192.168.65.3:8080", true},
	{"DNAT, IPv6", "[fdc4:f303:9324::3]:8080", true},
	{"container", "172.17.0.2:80", true},
	{"container, IPv6", "[fd00:17::2]:80", true},
	{"bridge", "172.17.0.1:80", true},
	{"nobody", "192.168.65.3:7", false},
	{"nobody, IPv6", "[fdc4:f303:9324::3]:7", false},
	{"nobody in the container", "172.17.0.2:7", false},
	{"nobody in the container, IPv6", "[fd00:17::2]:7", false},
}

// Transparent sockets reach everything that a port can lead to, and are seen as the
// gateway, through a firewall like Docker's and strict reverse path filters.
func testInboundConnects(t *testing.T) {
	g := startKernel(t, testSpec(t))
	pid, _, _ := strings.Cut(g.sh(t, makeContainer+dockerRules), "\n")
	serve(t, g, "")
	serve(t, g, pid)
	if got := g.sh(t, "cat "+sysctlDir+"tcp_tw_reuse"); got != "1" {
		t.Errorf("tcp_tw_reuse is %s", got)
	}
	for _, c := range inboundTargets {
		t.Run(c.name, func(t *testing.T) { inboundConnects(t, g, netip.MustParseAddrPort(c.to), c.answered) })
	}
	// Our bit of the mark, if it is the guest's own, means nothing.
	g.sh(t, "for i in iptables ip6tables; do $i -t mangle -A OUTPUT -p tcp -j MARK --or-mark 0x1000; done")
	for _, c := range inboundTargets {
		t.Run(c.name+", marked", func(t *testing.T) { inboundConnects(t, g, netip.MustParseAddrPort(c.to), c.answered) })
	}
	// Nothing of it came out of the device.
	g.TUN().SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	buf := make([]byte, 1<<16)
	for {
		n, err := g.TUN().Read(buf)
		if err != nil {
			break
		}
		if to, tcp := tcpOf(buf[virtioHeader:n]); tcp != nil {
			t.Errorf("a packet for %v with flags %#x came out", to, tcp[tcpFlagsOffset])
		}
	}
}

// dialAs connects a transparent socket of the guest, from its gateway.
func dialAs(t *testing.T, g *testGuest, to netip.AddrPort) (int, error) {
	t.Helper()
	kind, gateway := SocketTransparent4, g.spec.Gateway4
	if to.Addr().Is6() {
		kind, gateway = SocketTransparent6, g.spec.Gateway6
	}
	fd, err := g.Socket(kind, true)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Bind(fd, sockaddrOf(netip.AddrPortFrom(gateway, 0))); err != nil {
		t.Fatalf("bind: %v", err)
	}
	if err := unix.Connect(fd, sockaddrOf(to)); err != unix.EINPROGRESS {
		t.Fatalf("connect: %v", err)
	}
	eventually(t, "an answer from "+to.String(), func() bool {
		err = unix.Connect(fd, sockaddrOf(to))
		return err != unix.EALREADY
	})
	if err == unix.EISCONN {
		err = nil
	}
	return fd, err
}

func inboundConnects(t *testing.T, g *testGuest, to netip.AddrPort, answered bool) {
	fd, err := dialAs(t, g, to)
	if !answered {
		if err != unix.ECONNREFUSED {
			t.Errorf("connect: %v, want a refusal", err)
		}
		return
	}
	if err != nil {
		t.Fatalf("connect: %v", err)
	}
	if own := to.Port() == 80 && slices.ContainsFunc(g.spec.Addresses, func(p netip.Prefix) bool { return p.Addr() == to.Addr() }); own {
		// The server's answers have loopback's route from the first on, not the device's.
		if info, err := unix.GetsockoptTCPInfo(fd, unix.SOL_TCP, unix.TCP_INFO); err != nil || info.Snd_mss < 1<<14 {
			t.Errorf("the server takes segments of %d bytes, %v", info.Snd_mss, err)
		}
	}
	want := g.spec.Gateway4.String() + "\n"
	if to.Addr().Is6() {
		want = g.spec.Gateway6.String() + "\n"
	}
	if got := string(readAtLeast(t, fd, len(want))); got != want {
		t.Errorf("seen as %q, want %q", got, want)
	}
	exchange(t, fd, fd)
	unix.Shutdown(fd, unix.SHUT_WR)
	if rest := readAtLeast(t, fd, 1); len(rest) != 0 {
		t.Errorf("%q before the end", rest)
	}
}

// The same where the kernel has no labels.
func testInboundMarks(t *testing.T) {
	g := startKernel(t, testSpec(t))
	pid, _, _ := strings.Cut(g.sh(t, makeContainer+dockerRules), "\n")
	g.nft.Close() // with it the tables with labels go
	g.nft = nil
	for f, gateway := range map[string]string{"ip": g.spec.Gateway4.String(), "ip6": g.spec.Gateway6.String()} {
		rules := fmt.Sprintf(wantRules, f, localAddr(t, g.Kernel().Listener4), gateway)
		var marks []string
		for line := range strings.Lines(rules) {
			if !strings.Contains(line, "tproxy") {
				line = strings.ReplaceAll(line, "ct label set 124", "ct mark set ct mark or 0x1000")
				line = strings.ReplaceAll(line, "ct label set 125", "ct mark set ct mark or 0x2000")
				line = strings.ReplaceAll(line, "ct label ! 125", "ct mark and 0x2000 == 0")
				line = strings.ReplaceAll(line, "ct label 124", "ct mark and 0x1000 == 0x1000")
				line = strings.ReplaceAll(line, "ct label 125", "ct mark and 0x2000 == 0x2000")
				marks = append(marks, line)
			}
		}
		g.sh(t, "nft -f - <<'EOF'\n"+strings.Join(marks, "")+"EOF\n")
	}
	serve(t, g, "")
	serve(t, g, pid)
	for _, c := range inboundTargets {
		t.Run(c.name, func(t *testing.T) { inboundConnects(t, g, netip.MustParseAddrPort(c.to), c.answered) })
	}
}

// A forged SYN of a client, which comes in by the device for a container, goes to the
// container and not to our listener.
func testInboundForged(t *testing.T) {
	g := startKernel(t, testSpec(t))
	pid, _, _ := strings.Cut(g.sh(t, makeContainer), "\n")
	serve(t, g, pid)
	const client = "203.0.113.9:4000"
	if _, err := g.TUN().Write(syn4(client, "172.17.0.2:80")); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1<<16)
	g.TUN().SetReadDeadline(time.Now().Add(10 * time.Second))
	for {
		n, err := g.TUN().Read(buf)
		if err != nil {
			t.Fatalf("waiting for an answer: %v", err)
		}
		if to, tcp := tcpOf(buf[virtioHeader:n]); to == netip.MustParseAddrPort(client) {
			from := netip.AddrFrom4([4]byte(buf[virtioHeader+12:]))
			if tcp[tcpFlagsOffset] != tcpSYN|tcpACK || from.String() != "172.17.0.2" {
				t.Errorf("flags %#x from %v", tcp[tcpFlagsOffset], from)
			}
			break
		}
	}
	if _, _, err := unix.Accept4(fdOf(t, g.Kernel().Listener4), unix.SOCK_CLOEXEC); err != unix.EAGAIN {
		t.Errorf("our listener has it, too: %v", err)
	}
}

// Who waits for clients is known by family and address.
func testInboundListens(t *testing.T) {
	g := start(t, testSpec(t))
	g.sh(t, "ip link set lo up")
	wait := func(k SocketKind, to string, only6 int) {
		t.Helper()
		fd, err := g.Socket(k, true)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		a := netip.MustParseAddrPort(to)
		var sa unix.Sockaddr = &unix.SockaddrInet4{Port: int(a.Port()), Addr: [4]byte(a.Addr().AsSlice())}
		if a.Addr().Is6() {
			unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_V6ONLY, only6)
			sa = &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
		}
		err = unix.Bind(fd, sa)
		if k == SocketTCP4 || k == SocketTCP6 {
			err = errors.Join(err, unix.Listen(fd, 1))
		}
		if err != nil {
			t.Fatalf("%v on %s: %v", k, to, err)
		}
	}
	g.LearnListens(unix.IPPROTO_TCP, unix.IPPROTO_UDP)
	for udp, kinds := range [][2]SocketKind{{SocketTCP4, SocketTCP6}, {SocketUDP4, SocketUDP6}} {
		for at, only6 := range map[string]int{"0.0.0.0:8001": 0, "[::]:8002": 1, "[::]:8003": 0, "192.168.65.3:8004": 0, "127.0.0.1:8005": 0, "[::1]:8005": 1} {
			wait(kinds[strings.Count(at, "[")], at, only6)
		}
		for port, want := range map[uint16][2]bool{8001: {true, false}, 8002: {false, true}, 8003: {true, true}, 8004: {true, false}, 8005: {}, 8006: {}} {
			for i, a := range []netip.Addr{netip.MustParseAddr("192.168.65.3"), netip.MustParseAddr("fdc4:f303:9324::3")} {
				at := netip.AddrPortFrom(a, port)
				if got := g.Listens([]byte{unix.IPPROTO_TCP, unix.IPPROTO_UDP}[udp], at); got != want[i] {
					t.Errorf("udp %d: somebody listens at %v: %v, want %v", udp, at, got, want[i])
				}
			}
		}
	}
}

// A kernel that cannot tell of a protocol, its module missing, is asked once.
func testInboundListensUnknown(t *testing.T) {
	g := start(t, testSpec(t))
	const none = 200 // no protocol's number
	at := netip.MustParseAddrPort("192.168.65.3:80")
	asked := func(ipproto byte) uint32 {
		before := g.diag.seq
		g.Listens(ipproto, at)
		return g.diag.seq - before
	}
	if n := asked(unix.IPPROTO_TCP); n != 0 {
		t.Errorf("%d questions before it is known whether there is an answer", n)
	}
	g.LearnListens(unix.IPPROTO_TCP, none)
	if n := asked(none); n != 0 {
		t.Errorf("%d questions that nobody can answer", n)
	}
	if n := asked(unix.IPPROTO_TCP); n != 1 {
		t.Errorf("%d questions about TCP", n)
	}
}

func testInboundWhere(t *testing.T) {
	spec := testSpec(t)
	spec.Mirror = []netip.Prefix{netip.MustParsePrefix("10.77.0.0/16")}
	g := start(t, spec)
	g.sh(t, makeContainer)
	g.sh(t, "ip route add unreachable 203.0.113.0/24; ip route add blackhole 203.0.112.0/24; ip route add prohibit 203.0.111.0/24; ip -6 route add unreachable 2001:db8:9::/64")
	for a, want := range map[string]Place{
		"192.168.65.3": PlaceLocal, "127.0.0.1": PlaceLocal, "172.17.0.1": PlaceLocal, "::1": PlaceLocal, "fdc4:f303:9324::3": PlaceLocal,
		"172.17.0.2": PlaceInside, "fd00:17::2": PlaceInside, "172.17.200.1": PlaceInside,
		"198.51.100.7": PlaceOutside, "192.168.65.1": PlaceOutside, "10.77.1.1": PlaceOutside,
		"2001:db8::7": PlaceOutside, "::ffff:198.51.100.7": PlaceOutside,
		"203.0.113.9": PlaceUnrouted, "203.0.112.9": PlaceUnrouted, "203.0.111.9": PlaceUnrouted, "2001:db8:9::1": PlaceUnrouted,
		"224.0.0.1": PlaceUnrouted, "192.168.65.255": PlaceUnrouted, "ff02::1": PlaceUnrouted,
	} {
		if got, err := g.Where(netip.MustParseAddr(a)); got != want || err != nil {
			t.Errorf("%s is at %d, want %d (%v)", a, got, want, err)
		}
	}
	// Changes show within a second or so.
	g.sh(t, "ip route add unreachable 198.51.100.0/24")
	eventually(t, "the new route", func() bool {
		p, err := g.Where(netip.MustParseAddr("198.51.100.7"))
		return err == nil && p == PlaceUnrouted
	})
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			for j := range 1000 {
				a := netip.AddrFrom4([4]byte{172, 17, byte(i), byte(j)})
				if p, err := g.Where(a); err != nil || p != PlaceInside && j != 255 && a.As4()[2] != 0 {
					t.Errorf("%v is at %d, %v", a, p, err)
					return
				}
			}
		})
	}
	all.Wait()
	end(t, g.Agent)
	if _, err := g.Where(netip.MustParseAddr("10.0.0.1")); !errors.Is(err, ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

// The pool: of every kind, with and without waiting, many at once, and none is left.
func testInboundSockets(t *testing.T) {
	before := openFDs(t)
	g := startKernel(t, testSpec(t))
	for k := range socketKinds {
		if _, err := g.Socket(k, false); err != ErrNoneReady {
			t.Errorf("%v at once: %v", k, err)
		}
		eventually(t, "a socket at hand", func() bool {
			fd, err := g.Socket(k, false)
			if err == nil {
				unix.Close(fd)
			} else if err != ErrNoneReady {
				t.Fatal(err)
			}
			return err == nil
		})
	}
	if _, err := g.Socket(socketKinds, true); err == nil {
		t.Error("a socket of no kind")
	}
	if _, err := g.Sockets(t.Context(), socketKinds, 1); err == nil {
		t.Error("sockets of no kind")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if fds, err := g.Sockets(ctx, SocketUDP4, 3); err == nil {
		closeFDs(fds) // it was quick
	} else if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	inode := func(fd int) string {
		l, _ := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
		return l
	}
	var all sync.WaitGroup
	var mu sync.Mutex
	seen := make(map[string]bool)
	for range 400 {
		all.Go(func() {
			fd, err := g.Socket(SocketTransparent4, true)
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			if seen[inode(fd)] {
				t.Errorf("%s twice", inode(fd))
			}
			seen[inode(fd)] = true
			mu.Unlock()
		})
	}
	all.Wait()
	for _, e := range listFDs(t) {
		var fd int
		if fmt.Sscan(e, &fd); seen[inode(fd)] {
			unix.Close(fd)
		}
	}
	// Those who wait when the agent goes are told.
	for range 100 {
		all.Go(func() {
			if fd, err := g.Socket(SocketUDP6, true); err == nil {
				unix.Close(fd)
			} else if !errors.Is(err, ErrClosed) {
				t.Error(err)
			}
		})
	}
	end(t, g.Agent)
	all.Wait()
	if _, err := g.Socket(SocketUDP4, true); !errors.Is(err, ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	if after := openFDs(t); after != before {
		t.Errorf("%d descriptors, %d before", after, before)
	}
	spec := testSpec(t)
	spec.KernelPath = false
	if without := start(t, spec); without.HasSockets(SocketTransparent4) || !without.HasSockets(SocketTCP4) {
		t.Error("transparent sockets without the kernel path, or none without it")
	}
}

func openFDs(t *testing.T) int { return len(listFDs(t)) }

func listFDs(t *testing.T) (names []string) {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range fds {
		names = append(names, e.Name())
	}
	return names
}

// Loopback of our own namespaces takes large segments until there is a device that they
// could leave by; that of others stays as it is.
func testInboundSegments(t *testing.T) {
	const show = "ip -d link show lo | grep -o 'gso_max_size [0-9]*'"
	const large, ordinary = "gso_max_size 262144", "gso_max_size 65536"
	g := start(t, testSpec(t))
	g.sh(t, "ip link add d0 type veth peer name d1")
	if got := g.sh(t, show); got != large {
		t.Errorf("ours has %s", got)
	}
	g.sh(t, "ip link set d0 up")
	eventually(t, "loopback is ordinary beside another device", func() bool { return g.sh(t, show) == ordinary })

	inNamespace(t, func(t *testing.T) { // ip does not show it for IPv4
		nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			t.Fatal(err)
		}
		defer nl.Close()
		lo := &netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Index: loopback}}
		for _, size := range []int{loopbackSegment, ordinarySegment} {
			if err := setLoopbackSegment(nl, lo, size); err != nil {
				t.Fatal(err)
			}
			if l, err := nl.LinkByIndex(loopback); err != nil || int(l.Attrs().GSOIPv4MaxSize) != size {
				t.Errorf("%d: %+v, %v", size, l, err)
			}
		}
	})

	f := newForeign(t, ordinaryUser())
	start(t, joinSpec(t, Join{PID: f.pid}))
	if got := f.sh(t, show); got != ordinary {
		t.Errorf("that of others has %s", got)
	}
}
