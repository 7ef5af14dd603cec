package nsagent

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func init() {
	guestTests = append(guestTests,
		guestTest{"kernel_rules", testKernelRules},
		guestTest{"kernel_connects", testKernelConnects},
		guestTest{"kernel_container", testKernelContainer},
		guestTest{"kernel_leaves_alone", testKernelLeavesAlone},
		guestTest{"kernel_strict_filter", testKernelStrictFilter},
		guestTest{"kernel_marks", testKernelMarks},
		guestTest{"kernel_read_only_sysctls", testKernelReadOnlySysctls},
		guestTest{"kernel_without_ipv6", testKernelWithoutIPv6},
		guestTest{"kernel_not_asked", testKernelNotAsked},
		guestTest{"kernel_files", testKernelFiles},
	)
}

// startKernel starts a guest whose kernel path must be complete.
func startKernel(t testing.TB, spec Spec) *testGuest {
	t.Helper()
	g := start(t, spec)
	if r := g.Report(); r.Kernel+r.Kernel6+r.SNAT != "" {
		missing(t, "the kernel path: %s, %s, %s", r.Kernel, r.Kernel6, r.SNAT)
	}
	return g
}

// wantRules are the rules of rules_linux.go as nft reads them, for the family and the
// listener.
const wantRules = `
table %[1]s want {
	chain identity {
		type nat hook postrouting priority 90
		oifname "slipway0" snat to %[1]s saddr
	}
	chain raw {
		type filter hook prerouting priority raw
		iifname "slipway0" tcp flags & (fin | syn | rst | ack) == syn fib daddr type != local fib saddr oifname != "slipway0" notrack
	}
	chain prerouting {
		type filter hook prerouting priority -90
		iif lo accept
		meta mark and 0x1000 == 0x1000 meta mark set meta mark and 0xffffefff
		iifname "slipway0" tcp flags & (fin | syn | rst | ack) == syn fib daddr type != local fib saddr oifname != "slipway0" tproxy to %[2]s meta mark set meta mark or 0x1000 accept
		iifname "slipway0" tcp flags & (fin | syn | rst | ack) != syn socket transparent 1 ct label set 124
		tcp flags & syn == 0 ct direction reply ct label 125 meta mark set meta mark or 0x1000 accept
		%[1]s daddr %[3]s tcp flags & (syn | ack) == syn | ack ct direction reply ct label 125 meta mark set meta mark or 0x1000 accept
		tcp flags & syn == 0 socket transparent 1 meta mark set meta mark or 0x1000
	}
	chain output {
		type route hook output priority -90
		%[1]s daddr %[3]s meta mark and 0x10000000 == 0x10000000 accept
		%[1]s saddr %[3]s tcp flags & syn == 0 meta mark and 0x1000 == 0 accept
		meta mark and 0x1000 == 0x1000 meta mark set meta mark and 0xffffefff
		tcp flags & (fin | syn | rst | ack) != syn ct direction original ct label 124 meta mark set meta mark or 0x1000 accept
		oif lo tcp flags & (syn | ack) == syn | ack fib saddr type != local ct label set 124
		%[1]s saddr %[3]s tcp flags & (fin | syn | rst | ack) == syn ct label set 125
		tcp flags & syn == 0 ct direction original ct label ! 125 fib saddr type != local ct label set 125
		tcp flags & syn == 0 ct direction reply ct label 125 meta mark set meta mark or 0x1000 accept
		%[1]s daddr %[3]s tcp flags & (syn | ack) == syn | ack ct direction reply ct label 125 meta mark set meta mark or 0x1000 accept
	}
}
`

func testKernelRules(t *testing.T) {
	g := startKernel(t, testSpec(t))
	for family, listener := range map[string]*os.File{"ip": g.Kernel().Listener4, "ip6": g.Kernel().Listener6} {
		got := g.sh(t, "nft list table "+family+" slipway")
		first, got, _ := strings.Cut(got, "\n")
		owner, got, _ := strings.Cut(got, "\n")
		if !strings.HasPrefix(first, "table "+family+" slipway {") || strings.TrimSpace(owner) != "flags owner" {
			t.Errorf("%s\n%s", first, owner)
		}
		// Each version of nft has its own way to show rules.
		at := localAddr(t, listener)
		rules := fmt.Sprintf(wantRules, family, at, at.Addr())
		want := g.sh(t, "nft -f - <<'EOF'\n"+rules+"EOF\nnft list table "+family+" want; nft delete table "+family+" want")
		_, want, _ = strings.Cut(want, "\n")
		if got := strings.TrimLeft(got, "\n"); got != want {
			t.Errorf("table %s has\n%s\nwant\n%s", family, got, want)
		}
	}
}

// localAddr returns where a socket is bound.
func localAddr(t *testing.T, f *os.File) netip.AddrPort {
	t.Helper()
	fd, err := rawFD(f)
	if err != nil {
		t.Fatal(err)
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	return addrPortOf(sa)
}

// The kernel path from end to end, for processes of the namespace itself.
func testKernelConnects(t *testing.T) {
	kernelWorks(t, startKernel(t, testSpec(t)))
}

// kernelWorks connects the probes, with the test in the daemon's place.
func kernelWorks(t *testing.T, g *testGuest) {
	t.Helper()
	k := g.Kernel()
	if k == nil {
		t.Fatalf("no kernel path: %+v", g.Report())
	}
	for _, f := range []struct {
		probe, listener *os.File
		target          string
		own             string
	}{
		{k.Probe4, k.Listener4, "198.51.100.7:80", "192.168.65.3"},
		{k.Probe6, k.Listener6, "[2001:db8::7]:80", "fdc4:f303:9324::3"},
	} {
		target := netip.MustParseAddrPort(f.target)
		guest := fdOf(t, f.probe)
		if err := unix.Connect(guest, sockaddrOf(target)); err != unix.EINPROGRESS {
			t.Fatalf("connect: %v", err)
		}
		writeBackSYN(t, g, target)
		ours := acceptFrom(t, f.listener, target, f.own)
		exchange(t, guest, ours)
		exchange(t, ours, guest)
	}
}

// Behind a bridge with MASQUERADE, as containers are; each appears with its own address.
func testKernelContainer(t *testing.T) {
	g := startKernel(t, testSpec(t))
	k := g.Kernel()
	pid, _, _ := strings.Cut(g.sh(t, makeContainer), "\n")
	for _, f := range []struct {
		listener *os.File
		host     string
		own      string
	}{
		{k.Listener4, "198.51.100.7", "172.17.0.2"},
		{k.Listener6, "2001:db8::7", "fd00:17::2"},
	} {
		script := `exec 3<>/dev/tcp/` + f.host + `/80; head -c 100000 /dev/zero >&3; head -c 100000 <&3 | wc -c`
		out, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		p, err := g.Exec(t.Context(), Command{
			Args: []string{"nsenter", "-t", pid, "-n", "bash", "-c", script}, Env: os.Environ(), Stdout: w, Stderr: os.Stderr,
		})
		w.Close()
		if err != nil {
			t.Fatal(err)
		}
		target := netip.AddrPortFrom(netip.MustParseAddr(f.host), 80)
		writeBackSYN(t, g, target)
		ours := acceptFrom(t, f.listener, target, f.own)
		if n := len(readAtLeast(t, ours, 100000)); n != 100000 {
			t.Errorf("%d bytes from the container", n)
		}
		writeAll(t, ours, make([]byte, 100000))
		got := make([]byte, 64)
		n, _ := out.Read(got)
		out.Close()
		if st, err := p.Wait(); err != nil || st.Code != 0 || string(got[:n]) != "100000\n" {
			t.Errorf("status %+v, error %v, the container had %q bytes", st, err, got[:n])
		}
	}
}

// What the rules do not take: a local address, and a SYN that nobody wrote into the TUN.
func testKernelLeavesAlone(t *testing.T) {
	g := startKernel(t, testSpec(t))
	g.sh(t, `
		nft add table ip t; nft add chain ip t c '{ type filter hook input priority 0; }'
		nft add rule ip t c meta mark and 0x1000 == 0x1000 counter drop
		timeout 10 bash -c 'exec 3<>/dev/tcp/192.168.65.3/80' 2>&1 | grep -q refused
		timeout 10 bash -c 'exec 3<>/dev/tcp/127.0.0.1/80' 2>&1 | grep -q refused
		nft list chain ip t c | grep -q "packets 0 "`)
	// A forged one for a published port goes to who listens there.
	if _, err := g.TUN().Write(syn4("203.0.113.9:4000", "192.168.65.3:80")); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 4096)
	g.TUN().SetReadDeadline(time.Now().Add(10 * time.Second))
	for {
		n, err := g.TUN().Read(buf)
		if err != nil {
			t.Fatalf("waiting for a reset: %v", err)
		}
		if to, tcp := tcpOf(buf[virtioHeader:n]); to == netip.MustParseAddrPort("203.0.113.9:4000") {
			if tcp[tcpFlagsOffset] != tcpRST|tcpACK {
				t.Errorf("flags %#x", tcp[tcpFlagsOffset])
			}
			break
		}
	}
	if _, _, err := unix.Accept4(fdOf(t, g.Kernel().Listener4), unix.SOCK_CLOEXEC); err != unix.EAGAIN {
		t.Errorf("accept: %v", err)
	}
}

// syn4 makes a SYN with a virtio-net header that asks for no checksum to be made.
func syn4(from, to string) []byte {
	f, d := netip.MustParseAddrPort(from), netip.MustParseAddrPort(to)
	ip := append([]byte{0x45, 0, 0, 40, 0, 1, 0, 0, 64, unix.IPPROTO_TCP, 0, 0}, f.Addr().AsSlice()...)
	ip = append(ip, d.Addr().AsSlice()...)
	binary.BigEndian.PutUint16(ip[10:], checksum(ip))
	tcp := binary.BigEndian.AppendUint16(nil, f.Port())
	tcp = binary.BigEndian.AppendUint16(tcp, d.Port())
	tcp = append(tcp, 0, 0, 0, 1, 0, 0, 0, 0, 5<<4, tcpSYN, 0xff, 0xff, 0, 0, 0, 0)
	pseudo := append(append([]byte{}, ip[12:20]...), 0, unix.IPPROTO_TCP, 0, byte(len(tcp)))
	binary.BigEndian.PutUint16(tcp[16:], checksum(append(pseudo, tcp...)))
	return append(make([]byte, virtioHeader), append(ip, tcp...)...)
}

// checksum is that of RFC 1071, of an even number of bytes.
func checksum(b []byte) uint16 {
	sum := uint32(0)
	for i := 0; i < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// virtioHeader is the length of the header before each packet of the TUN.
const virtioHeader = 10

// fdOf returns the descriptor of an open file.
func fdOf(t testing.TB, f *os.File) int {
	t.Helper()
	fd, err := rawFD(f)
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

// acceptFrom accepts a connection to target from the address own.
func acceptFrom(t *testing.T, listener *os.File, target netip.AddrPort, own string) int {
	t.Helper()
	var ours int
	var peer unix.Sockaddr
	eventually(t, "a connection to accept", func() (ok bool) {
		var err error
		ours, peer, err = unix.Accept4(fdOf(t, listener), unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
		return err == nil
	})
	t.Cleanup(func() { unix.Close(ours) })
	local, err := unix.Getsockname(ours)
	if err != nil {
		t.Fatal(err)
	}
	if got := addrPortOf(local); got != target {
		t.Errorf("accepted at %v, want %v", got, target)
	}
	if got := addrPortOf(peer).Addr().String(); got != own {
		t.Errorf("accepted from %v, want %v", got, own)
	}
	for name, want := range map[int]int{unix.TCP_NODELAY: 1, unix.TCP_KEEPIDLE: keepIdle, unix.TCP_KEEPCNT: keepCount, unix.TCP_KEEPINTVL: keepInterval} {
		if got, err := unix.GetsockoptInt(ours, unix.SOL_TCP, name); err != nil || got != want {
			t.Errorf("option %d of an accepted socket: %d, want %d (%v)", name, got, want, err)
		}
	}
	return ours
}

// writeBackSYN reads a SYN for target from the TUN and writes it into the TUN.
func writeBackSYN(t *testing.T, g *testGuest, target netip.AddrPort) {
	t.Helper()
	buf := make([]byte, 4096)
	g.TUN().SetReadDeadline(time.Now().Add(10 * time.Second))
	for {
		n, err := g.TUN().Read(buf)
		if err != nil {
			t.Fatalf("waiting for a SYN: %v", err)
		}
		to, tcp := tcpOf(buf[virtioHeader:n])
		if to == target && tcp[tcpFlagsOffset]&^0xc0 == tcpSYN { // with or without ECN
			if _, err := g.TUN().Write(buf[:n]); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
}

// tcpOf returns a TCP packet's destination and its TCP header, or nothing.
func tcpOf(p []byte) (netip.AddrPort, []byte) {
	switch {
	case p[0]>>4 == 4 && p[9] == unix.IPPROTO_TCP:
		tcp := p[p[0]&15*4:]
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(p[16:20])), binary.BigEndian.Uint16(tcp[2:])), tcp
	case p[0]>>4 == 6 && p[6] == unix.IPPROTO_TCP:
		tcp := p[40:]
		return netip.AddrPortFrom(netip.AddrFrom16([16]byte(p[24:40])), binary.BigEndian.Uint16(tcp[2:])), tcp
	}
	return netip.AddrPort{}, nil
}

func addrPortOf(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port))
	}
	return netip.AddrPort{}
}

func sockaddrOf(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is6() {
		return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
}

// exchange sends more than one segment between non-blocking sockets.
func exchange(t *testing.T, from, to int) {
	t.Helper()
	want := []byte(strings.Repeat("0123456789", 10000))
	var writer sync.WaitGroup
	defer writer.Wait()
	writer.Go(func() { writeAll(t, from, want) })
	if got := readAtLeast(t, to, len(want)); !bytes.Equal(got, want) {
		t.Error("other data")
	}
}

// writeAll writes to a non-blocking socket.
func writeAll(t *testing.T, fd int, b []byte) {
	for len(b) > 0 {
		n, err := unix.Write(fd, b)
		if err == unix.EAGAIN || err == unix.EINTR {
			unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, 10000)
			continue
		}
		if err != nil {
			t.Error(err)
			return
		}
		b = b[n:]
	}
}

// readAtLeast reads from a non-blocking socket.
func readAtLeast(t *testing.T, fd, size int) []byte {
	t.Helper()
	var got []byte
	buf := make([]byte, 65536)
	eventually(t, "all data", func() bool {
		n, err := unix.Read(fd, buf)
		if err != nil && err != unix.EAGAIN {
			t.Fatal(err)
		}
		got = append(got, buf[:max(n, 0)]...)
		return len(got) >= size || n == 0 && err == nil
	})
	return got
}

// Strict filtering of every device leaves no room for ours; in a namespace of somebody
// else's it comes back.
func testKernelStrictFilter(t *testing.T) {
	const show = `for d in all default lo d0 d1; do printf "$d=%s " $(cat /proc/sys/net/ipv4/conf/$d/rp_filter); done`
	for _, c := range []struct{ all, def, before string }{
		{"1", "0", "all=1 default=0 lo=0 d0=2 d1=0 "},
		{"2", "0", "all=2 default=0 lo=0 d0=2 d1=0 "},
		{"0", "1", "all=0 default=1 lo=0 d0=2 d1=0 "},
	} {
		f := newForeign(t, ordinaryUser())
		f.sh(t, "cd /proc/sys/net/ipv4/conf; ip link add d0 type veth peer name d1; echo 0 >lo/rp_filter; echo 2 >d0/rp_filter; echo 0 >d1/rp_filter; echo "+
			c.def+" >default/rp_filter; echo "+c.all+" >all/rp_filter")
		if got := f.sh(t, show); got != c.before {
			t.Fatalf("it has %s", got)
		}
		g := start(t, joinSpec(t, Join{PID: f.pid}))
		if got := f.sh(t, show); got != c.before {
			t.Errorf("all=%s: %s, want %s", c.all, got, c.before)
		}
		if got := f.sh(t, "cat /proc/sys/net/ipv4/conf/slipway0/rp_filter /proc/sys/net/ipv4/conf/slipway0/accept_local"); got != "2\n1" {
			t.Errorf("ours has %q", got)
		}
		kernelWorks(t, g)
		end(t, g.Agent)
		if got := f.sh(t, show); got != c.before {
			t.Errorf("all=%s: afterwards %s, want %s", c.all, got, c.before)
		}
	}
}

// Settings by which our mark would mean more than it should.
func testKernelMarks(t *testing.T) {
	inNamespace(t, func(t *testing.T) { // one of our own; it would be the host's that has it
		for name, want := range map[string]string{"conf/all/src_valid_mark": "0", "conf/default/src_valid_mark": "0", acceptMark: "1"} {
			for _, was := range []string{"0", "1"} {
				if err := changeSysctl(name, was); err != nil {
					t.Error(err)
				}
				if err := admitMarks(true); err != nil {
					t.Error(err)
				}
				if now, err := readSysctl(name); err != nil || now != want {
					t.Errorf("%s was %s and is %q, %v", name, was, now, err)
				}
			}
		}
	})
	for _, name := range []string{"conf/all/src_valid_mark", "conf/default/src_valid_mark", "tcp_fwmark_accept"} {
		f := newForeign(t, ordinaryUser())
		f.sh(t, "echo 1 >"+sysctlDir+name)
		g := start(t, joinSpec(t, Join{PID: f.pid}))
		if r := g.Report(); r.Kernel != sysctlName(name)+" is 1" || g.Kernel() != nil || r.SNAT != "" {
			t.Errorf("%+v", r)
		}
		if got := f.sh(t, "cat "+sysctlDir+name); got != "1" {
			t.Errorf("%s is %s now", name, got)
		}
	}
}

// A container's /proc/sys is often read-only.
func testKernelReadOnlySysctls(t *testing.T) {
	if ordinaryUser() || !wholeHost(t) {
		return
	}
	const dir = "/proc/sys"
	if err := unix.Mount(dir, dir, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	if err := unix.Mount("", dir, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	f := newForeign(t, false)
	before := f.sh(t, foreignState+foreignKernelState)
	g := start(t, joinSpec(t, Join{PID: f.pid}))
	const want = "net.ipv4.conf.slipway0.accept_local cannot be set: read-only file system"
	if r := g.Report(); r.Kernel != want || r.Kernel6 != "" || r.SNAT != "" || g.Kernel() != nil {
		t.Errorf("%+v", r)
	}
	if state := f.sh(t, foreignKernelState+"nft list ruleset"); strings.Contains(state, "7965") || strings.Contains(state, "tproxy") {
		t.Errorf("half a kernel path:\n%s", state)
	}
	end(t, g.Agent)
	if after := f.sh(t, foreignState+foreignKernelState); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

// Without IPv6 there is the other half.
func testKernelWithoutIPv6(t *testing.T) {
	spec := testSpec(t)
	spec.Addresses, spec.Gateway6, spec.Default6 = spec.Addresses[:1], netip.Addr{}, false
	g := start(t, spec)
	k := g.Kernel()
	if r := g.Report(); k == nil || r.Kernel != "" || r.Kernel6 == "" {
		t.Fatalf("%+v", r)
	}
	if k.Listener4 == nil || k.Probe4 == nil || k.Listener6 != nil || k.Probe6 != nil {
		t.Errorf("%+v", k)
	}
	if rules := g.sh(t, "nft list table ip6 slipway; ip -6 rule"); strings.Contains(rules, "tproxy") || strings.Contains(rules, "7965") {
		t.Errorf("half of IPv6:\n%s", rules)
	}
}

func testKernelNotAsked(t *testing.T) {
	spec := testSpec(t)
	spec.KernelPath = false
	g := start(t, spec)
	if r := g.Report(); g.Kernel() != nil || r.Kernel+r.Kernel6 != "" {
		t.Errorf("%+v", r)
	}
	if state := g.sh(t, "nft list ruleset; ip rule"); strings.Contains(state, "tproxy") || strings.Contains(state, "7965") {
		t.Errorf("there is\n%s", state)
	}
}

// Files that Start opened are the caller's or go with Release.
func testKernelFiles(t *testing.T) {
	count := func() int {
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(fds)
	}
	end(t, start(t, testSpec(t)).Agent) // whatever is opened once
	before := count()
	for range 3 {
		end(t, start(t, testSpec(t)).Agent)
	}
	if after := count(); after != before {
		t.Errorf("%d files, %d before", after, before)
	}
	f := newForeign(t, ordinaryUser())
	before = count()
	for range 3 {
		end(t, start(t, joinSpec(t, Join{PID: f.pid})).Agent)
	}
	if after := count(); after != before {
		t.Errorf("joined: %d files, %d before", after, before)
	}
}
