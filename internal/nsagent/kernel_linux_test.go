package nsagent

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func init() {
	guestTests = append(guestTests,
		guestTest{"kernel_rules", testKernelRules},
		guestTest{"kernel_connects", testKernelConnects},
	)
}

// kernelSpec is a guest with the kernel path.
func kernelSpec(t testing.TB) Spec {
	spec := testSpec(t)
	spec.KernelPath = true
	return spec
}

// startKernel starts a guest whose kernel path must be complete.
func startKernel(t testing.TB, spec Spec) *testGuest {
	t.Helper()
	g := start(t, spec)
	if k := g.Kernel(); k != nil {
		t.Cleanup(func() { closeAll([]*os.File{k.Listener4, k.Listener6, k.Probe4, k.Probe6}) })
	}
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
		iifname "slipway0" tcp flags & (fin | syn | rst | ack) == syn fib daddr type != local notrack
	}
	chain prerouting {
		type filter hook prerouting priority -90
		iifname "slipway0" tcp flags & (fin | syn | rst | ack) == syn fib daddr type != local tproxy to %[2]s meta mark set meta mark or 0x1000 accept
		tcp flags & (fin | syn | rst | ack) != syn socket transparent 1 meta mark set meta mark or 0x1000
	}
	chain output {
		type route hook output priority -90
		meta l4proto tcp ct direction original ct mark and 0x1000 == 0x1000 meta mark set meta mark or 0x1000 accept
		oif lo tcp flags & (syn | ack) == syn | ack fib saddr type != local ct mark set ct mark or 0x1000
	}
}
`

func testKernelRules(t *testing.T) {
	g := startKernel(t, kernelSpec(t))
	for family, listener := range map[string]*os.File{"ip": g.Kernel().Listener4, "ip6": g.Kernel().Listener6} {
		got := g.sh(t, "nft list table "+family+" slipway")
		first, got, _ := strings.Cut(got, "\n")
		owner, got, _ := strings.Cut(got, "\n")
		if !strings.HasPrefix(first, "table "+family+" slipway {") || strings.TrimSpace(owner) != "flags owner" {
			t.Errorf("%s\n%s", first, owner)
		}
		// Each version of nft has its own way to show rules.
		rules := fmt.Sprintf(wantRules, family, localAddr(t, listener))
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

// connectsByHand has a socket of the namespace connect and does what the daemon does for
// it, and returns the two ends.
func connectsByHand(t *testing.T, g *testGuest, probe, listener *os.File, target netip.AddrPort) (guest, ours int) {
	t.Helper()
	var to unix.Sockaddr = &unix.SockaddrInet4{Addr: [4]byte{}, Port: int(target.Port())}
	if target.Addr().Is6() {
		to = &unix.SockaddrInet6{Addr: target.Addr().As16(), Port: int(target.Port())}
	} else {
		to.(*unix.SockaddrInet4).Addr = target.Addr().As4()
	}
	guest, err := rawFD(probe)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Connect(guest, to); err != unix.EINPROGRESS {
		t.Fatalf("connect: %v", err)
	}
	writeBackSYN(t, g, target)
	lfd, err := rawFD(listener)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "a connection to accept", func() bool {
		ours, _, err = unix.Accept4(lfd, unix.SOCK_CLOEXEC)
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
	return guest, ours
}

// writeBackSYN reads a SYN for target from the TUN and writes it into the TUN.
func writeBackSYN(t *testing.T, g *testGuest, target netip.AddrPort) {
	t.Helper()
	const header = 10 // virtio-net
	buf := make([]byte, 4096)
	g.TUN().SetReadDeadline(time.Now().Add(10 * time.Second))
	for {
		n, err := g.TUN().Read(buf)
		if err != nil {
			t.Fatalf("waiting for a SYN: %v", err)
		}
		p := buf[header:n]
		to, tcp := tcpOf(p)
		if to == target && tcp[tcpFlagsOffset] == tcpSYN {
			if _, err := g.TUN().Write(buf[:n]); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
}

// tcpOf returns a TCP packet's destination and its TCP header.
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

func testKernelConnects(t *testing.T) {
	g := startKernel(t, kernelSpec(t))
	k := g.Kernel()
	for _, f := range []struct {
		probe, listener *os.File
		target          string
	}{
		{k.Probe4, k.Listener4, "198.51.100.7:80"},
		{k.Probe6, k.Listener6, "[2001:db8::7]:80"},
	} {
		guest, ours := connectsByHand(t, g, f.probe, f.listener, netip.MustParseAddrPort(f.target))
		exchange(t, guest, ours)
		exchange(t, ours, guest)
	}
}

// exchange sends more than one segment.
func exchange(t *testing.T, from, to int) {
	t.Helper()
	want := []byte(strings.Repeat("0123456789", 10000))
	go func() {
		for b := want; len(b) > 0; {
			n, err := unix.Write(from, b)
			if err != nil && err != unix.EAGAIN {
				return
			}
			b = b[max(n, 0):]
		}
	}()
	var got []byte
	buf := make([]byte, 65536)
	eventually(t, "all data", func() bool {
		n, err := unix.Read(to, buf)
		if err != nil && err != unix.EAGAIN {
			t.Fatal(err)
		}
		got = append(got, buf[:max(n, 0)]...)
		return len(got) >= len(want)
	})
	if !bytes.Equal(got, want) {
		t.Error("other data")
	}
}
