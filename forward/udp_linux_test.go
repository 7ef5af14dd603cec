package forward

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/slipway-net/slipway/internal/flow"
	"github.com/slipway-net/slipway/internal/flow/table"
)

// hostMaps returns maps on the host's own sockets, with access to its loopback.
func hostMaps(t testing.TB, guest flow.Guest, limit int) *udpMaps {
	t.Helper()
	before := countFDs(t)
	u := newUDPMaps(udpConfig{
		Guest: guest, Table: table.New(), Policy: NewPolicy(hostPolicy()), Log: slog.New(slog.DiscardHandler), Max: limit,
	})
	t.Cleanup(func() {
		u.close()
		wantFDs(t, before)
	})
	return u
}

func countFDs(t testing.TB) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// wantFDs waits until there are no more descriptors than before: who ended earlier may just
// be closing some.
func wantFDs(t testing.TB, before int) {
	t.Helper()
	waitFor(t, fmt.Sprintf("no more than %d file descriptors", before), func() bool { return countFDs(t) <= before })
}

// echoServer sends back what it gets on addr until the test ends, and returns where.
func echoServer(t testing.TB, addr string) netip.AddrPort {
	t.Helper()
	conn, err := net.ListenPacket("udp", addr)
	if err != nil {
		t.Fatal(err)
	}
	var loop sync.WaitGroup
	loop.Go(func() { serveEcho(conn.(*net.UDPConn)) })
	t.Cleanup(func() {
		conn.Close()
		loop.Wait()
	})
	return conn.LocalAddr().(*net.UDPAddr).AddrPort()
}

func serveEcho(conn *net.UDPConn) {
	buf := make([]byte, 1<<16)
	for {
		n, from, err := conn.ReadFromUDPAddrPort(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil {
			conn.WriteToUDPAddrPort(buf[:n], from)
		}
	}
}

// bothFamilies runs f with a guest, the host's alias and the loopback of each family.
func bothFamilies(t *testing.T, f func(t *testing.T, guest netip.AddrPort, alias, loopback netip.Addr)) {
	t.Run("v4", func(t *testing.T) { f(t, guest1, alias4, loopback4) })
	t.Run("v6", func(t *testing.T) { f(t, guest6, alias6, loopback6) })
}

func TestUDPEcho(t *testing.T) {
	bothFamilies(t, func(t *testing.T, guest netip.AddrPort, alias, loopback netip.Addr) {
		g := newFakeGuest()
		u := hostMaps(t, g, 0)
		server := echoServer(t, netip.AddrPortFrom(loopback, 0).String())
		target := netip.AddrPortFrom(alias, server.Port())
		for _, size := range []int{0, 1, 1472, 9000, 65507} {
			payload := bytes.Repeat([]byte{byte(size)}, size)
			u.Datagram(flow.Datagram{Guest: guest, Target: target, Payload: payload, Hops: 10, TOS: 0x2e << 2})
			d := take(t, g, &g.datagrams)
			if d.Guest != guest || d.Target != target || !bytes.Equal(d.Payload, payload) || d.Hops != defaultHops-1 || d.Segment != 0 {
				t.Errorf("%d bytes: %d came back from %v to %v, hops %d", size, len(d.Payload), d.Target, d.Guest, d.Hops)
			}
		}
	})
}

func TestUDPRefused(t *testing.T) {
	bothFamilies(t, func(t *testing.T, guest netip.AddrPort, alias, loopback netip.Addr) {
		g := newFakeGuest()
		u := hostMaps(t, g, 0)
		target := netip.AddrPortFrom(alias, 1) // tcpmux: nobody listens
		for range 3 {
			u.Datagram(datagram(guest, target, "anybody?"))
			e := take(t, g, &g.errors)
			if e.ICMP != portUnreachable(alias) || e.From != alias || e.Target != target || string(e.Quote) != "anybody?" {
				t.Errorf("guest got %+v, want port unreachable from %v", e, alias)
			}
		}
		server := echoServer(t, netip.AddrPortFrom(loopback, 0).String())
		target = netip.AddrPortFrom(alias, server.Port())
		u.Datagram(datagram(guest, target, "you"))
		take(t, g, &g.datagrams)
	})
}

// TestUDPErrorBeforeSend holds the socket to sending what comes after an error that
// has not been read yet: the kernel reports it on the next send instead.
func TestUDPErrorBeforeSend(t *testing.T) {
	g := newFakeGuest()
	u := hostMaps(t, g, 0)
	server := echoServer(t, "127.0.0.1:0")
	target := netip.AddrPortFrom(alias4, server.Port())
	const n = 200
	for i := range n {
		u.Datagram(datagram(guest1, netip.AddrPortFrom(alias4, uint16(1+i%2)), "refused"))
		u.Datagram(datagram(guest1, target, fmt.Sprint(i)))
		if d := take(t, g, &g.datagrams); string(d.Payload) != fmt.Sprint(i) {
			t.Fatalf("%q came back, want %d", d.Payload, i)
		}
	}
	if s := u.stats(); s.Failed != 0 {
		t.Errorf("%+v, want nothing failed", s)
	}
}

// Errors that many earlier datagrams have left on the socket are taken off by its receiver,
// each of which brings up the next: none is that of the datagram that is just being sent.
func TestUDPSendsPastErrors(t *testing.T) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := reportAll(fd, false); err != nil {
		t.Fatal(err)
	}
	s := new(udpSender)
	s.fd.open(fd)
	defer s.fd.close()
	sink, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer sink.Close()
	to, closed := sink.LocalAddr().(*net.UDPAddr).AddrPort(), netip.MustParseAddrPort("127.0.0.1:1")
	failed, errs := 0, 0
	for range 100 {
		for range 100 {
			unix.Sendto(fd, []byte("refused"), unix.MSG_DONTWAIT, sockaddr(closed))
		}
		var drained atomic.Bool
		go func() {
			defer drained.Store(true)
			s.fd.drainErrors(func(sentError) { errs++ })
		}()
		for !drained.Load() {
			if err := s.sendFrom(flow.Datagram{Payload: []byte("x")}, netip.Addr{}, to); err != nil {
				failed++
			}
		}
	}
	if failed > 0 || errs == 0 {
		t.Errorf("%d datagrams were lost to %d errors of others", failed, errs)
	}
}

func TestUDPServiceOnTheOtherLoopback(t *testing.T) {
	bothFamilies(t, func(t *testing.T, guest netip.AddrPort, alias, loopback netip.Addr) {
		g := newFakeGuest()
		u := hostMaps(t, g, 0)
		other := loopback6
		if loopback == loopback6 {
			other = loopback4
		}
		server := echoServer(t, netip.AddrPortFrom(other, 0).String())
		target := netip.AddrPortFrom(alias, server.Port())
		for i := range 3 {
			u.Datagram(datagram(guest, target, fmt.Sprint(i)))
			if d := take(t, g, &g.datagrams); d.Target != target || d.Guest != guest || string(d.Payload) != fmt.Sprint(i) {
				t.Errorf("guest got %q from %v, want %d from %v", d.Payload, d.Target, i, target)
			}
		}
		if _, _, n := g.lengths(); n != 0 {
			t.Errorf("guest got errors %+v", g.errors)
		}
	})
}

func TestUDPTrains(t *testing.T) {
	bothFamilies(t, func(t *testing.T, guest netip.AddrPort, alias, loopback netip.Addr) {
		g := newFakeGuest()
		u := hostMaps(t, g, 0)
		server := echoServer(t, netip.AddrPortFrom(loopback, 0).String())
		payload := make([]byte, 40*1000+77)
		for i := range payload {
			payload[i] = byte(i / 1000)
		}
		u.Datagram(flow.Datagram{
			Guest: guest, Target: netip.AddrPortFrom(alias, server.Port()), Payload: payload, Segment: 1000, Hops: 63, DontFragment: true,
		})
		var back []byte
		writes := 0
		for ; len(back) < len(payload); writes++ {
			d := take(t, g, &g.datagrams)
			if d.Segment != 0 && d.Segment != 1000 || d.Segment == 0 && len(d.Payload) > 1000 {
				t.Fatalf("%d bytes in segments of %d", len(d.Payload), d.Segment)
			}
			back = append(back, d.Payload...)
		}
		if !bytes.Equal(back, payload) {
			t.Errorf("%d bytes came back, not those that were sent", len(back))
		}
		t.Logf("41 datagrams came back in %d writes", writes)
	})
}

// TestUDPTrainOfMany sends more datagrams than one call may take.
func TestUDPTrainOfMany(t *testing.T) {
	g := newFakeGuest()
	u := hostMaps(t, g, 0)
	server := echoServer(t, "127.0.0.1:0")
	u.Datagram(flow.Datagram{
		Guest: guest1, Target: netip.AddrPortFrom(alias4, server.Port()), Payload: make([]byte, udpMaxSegments), Segment: 1, Hops: 63,
	})
	for n := 0; n < udpMaxSegments; {
		n += len(take(t, g, &g.datagrams).Payload)
	}
}

func TestUDPOneBadDatagramDoesNotEndAMapping(t *testing.T) {
	g := newFakeGuest()
	u := hostMaps(t, g, 0)
	server := echoServer(t, "127.0.0.1:0")
	target := netip.AddrPortFrom(alias4, server.Port())
	u.Datagram(datagram(guest1, target, string(make([]byte, 65508)))) // one more than UDP has room for
	u.Datagram(datagram(guest1, target, "good"))
	if d := take(t, g, &g.datagrams); string(d.Payload) != "good" {
		t.Errorf("%d bytes came back, want good", len(d.Payload))
	}
	if n := u.stats().Mappings; n != 1 {
		t.Errorf("%d mappings, want 1", n)
	}
}

// slowGuest takes nothing until it is released.
type slowGuest struct {
	countingGuest
	started, release chan struct{}
	once             *sync.Once
}

func (g slowGuest) WriteDatagram(d flow.Datagram) error {
	g.once.Do(func() { close(g.started); <-g.release })
	return g.countingGuest.WriteDatagram(d)
}

// TestUDPOverrunIsCounted fills the host's socket while the guest's link is stuck.
func TestUDPOverrunIsCounted(t *testing.T) {
	g := slowGuest{countingGuest{make(chan int, 1<<16)}, make(chan struct{}), make(chan struct{}), new(sync.Once)}
	u := hostMaps(t, g, 0)
	peer, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	peer.SetDeadline(time.Now().Add(patience))
	b := make([]byte, 1000)
	u.Datagram(flow.Datagram{Guest: guest1, Target: netip.AddrPortFrom(alias4, peer.LocalAddr().(*net.UDPAddr).AddrPort().Port()), Payload: b, Hops: 63})
	_, mapping, err := peer.ReadFrom(b)
	if err != nil {
		t.Fatal(err)
	}
	answer := func() {
		if _, err := peer.WriteTo(b, mapping); err != nil {
			t.Fatal(err)
		}
	}
	answer()
	<-g.started
	for range 3000 { // several times what a socket holds
		answer()
	}
	close(g.release)
	for deadline := time.Now().Add(patience); u.stats().Overrun == 0; {
		if time.Now().After(deadline) {
			t.Fatalf("%+v, want some overrun", u.stats())
		}
		answer() // the next one tells of those that were lost
		<-g.got
	}
}

// TestUDPStress has mappings come and go while datagrams pass: for the race detector
// and for file descriptors.
func TestUDPStress(t *testing.T) {
	g := newFakeGuest()
	u := hostMaps(t, g, 12)
	server := echoServer(t, "127.0.0.1:0")
	target := netip.AddrPortFrom(alias4, server.Port())
	var senders sync.WaitGroup
	for s := range 4 {
		senders.Go(func() {
			guest := netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 168, 65, byte(10 + s)}), 0)
			for i := range 2000 {
				u.Datagram(datagram(nth(guest, i%7), target, "x"))
				if i%50 == 0 {
					u.Datagram(datagram(nth(guest, i%7), netip.AddrPortFrom(alias4, 1), "x"))
				}
			}
		})
	}
	senders.Wait()
	take(t, g, &g.datagrams)
	if s := u.stats(); s.Mappings > 12 {
		t.Errorf("%+v, want at most 12 mappings", s)
	}
}

// TestUDPIdleMappingsAreSmall measures what an idle mapping costs the daemon.
func TestUDPIdleMappingsAreSmall(t *testing.T) {
	const n = 2000
	g := newFakeGuest()
	u := hostMaps(t, g, n*2)
	server := echoServer(t, "127.0.0.1:0")
	target := netip.AddrPortFrom(alias4, server.Port())
	u.Datagram(datagram(guest1, target, "start the poller"))
	take(t, g, &g.datagrams)
	fds, goroutines, heap := countFDs(t), runtime.NumGoroutine(), heapInUse()
	for i := range n {
		u.Datagram(datagram(nth(guest2, i), target, "x"))
		take(t, g, &g.datagrams)
	}
	if d := countFDs(t) - fds; d > n {
		t.Errorf("%d file descriptors for %d mappings", d, n)
	}
	if d := runtime.NumGoroutine() - goroutines; d > 0 {
		t.Errorf("%d goroutines for %d mappings", d, n)
	}
	each := (int64(heapInUse()) - int64(heap)) / n
	if each > 4096 {
		t.Errorf("%d bytes for an idle mapping, want at most 4096", each)
	}
	t.Logf("%d bytes of heap, 1 descriptor and no goroutine for an idle mapping", each)
}

func heapInUse() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

func FuzzAncillary(f *testing.F) {
	oob := make([]byte, unix.CmsgSpace(4))
	putCmsgHeader(oob, unix.SOL_UDP, unix.UDP_GRO, 4)
	f.Add(oob)
	putCmsgHeader(oob, unix.SOL_IP, unix.IP_TOS, 1)
	f.Add(append(bytes.Clone(oob), oob...))
	errs := make([]byte, unix.CmsgSpace(sockExtendedErrLen+unix.SizeofSockaddrInet6))
	putCmsgHeader(errs, unix.SOL_IPV6, unix.IPV6_RECVERR, sockExtendedErrLen+unix.SizeofSockaddrInet6)
	f.Add(errs)
	f.Add(putPktinfo(make([]byte, 64), ip("192.0.2.1")))
	f.Add(putPktinfo(make([]byte, 64), ip("2001:db8::1")))
	f.Fuzz(func(t *testing.T, b []byte) {
		if a := parseAncillary(b); a.segment < 0 || a.segment > 0xffff {
			t.Errorf("parseAncillary(% x) = %+v", b, a)
		}
		parseSentError(b)
	})
}

func TestParseAncillary(t *testing.T) {
	number := func(level, typ int32, n int, v byte) []byte {
		b := make([]byte, unix.CmsgSpace(n))
		putCmsgHeader(b, level, typ, n)
		b[unix.CmsgLen(0)] = v // little endian, or a single byte
		return b
	}
	tests := []struct {
		name string
		oob  []byte
		want ancillary
	}{
		{"nothing", nil, ancillary{hops: defaultHops}},
		{"v4", append(number(unix.SOL_IP, unix.IP_TTL, 4, 7), number(unix.SOL_IP, unix.IP_TOS, 1, 9)...), ancillary{hops: 7, tos: 9}},
		{"v6", append(number(unix.SOL_IPV6, unix.IPV6_HOPLIMIT, 4, 7), number(unix.SOL_IPV6, unix.IPV6_TCLASS, 4, 9)...), ancillary{hops: 7, tos: 9}},
		{"train", number(unix.SOL_UDP, unix.UDP_GRO, 4, 100), ancillary{segment: 100, hops: defaultHops}},
		{"overrun", number(unix.SOL_SOCKET, unix.SO_RXQ_OVFL, 4, 5), ancillary{hops: defaultHops, overrun: 5}},
		{"asked_v4", putPktinfo(make([]byte, 64), ip("192.0.2.1")), ancillary{hops: defaultHops, local: ip("192.0.2.1")}},
		{"asked_v6", putPktinfo(make([]byte, 64), ip("2001:db8::1")), ancillary{hops: defaultHops, local: ip("2001:db8::1")}},
		{"asked_short", number(unix.SOL_IP, unix.IP_PKTINFO, 8, 1), ancillary{hops: defaultHops}},
		{"other", number(unix.SOL_SOCKET, unix.SO_TIMESTAMP, 8, 1), ancillary{hops: defaultHops}},
		{"cut", number(unix.SOL_IP, unix.IP_TTL, 4, 7)[:17], ancillary{hops: defaultHops}},
		{"zero", number(unix.SOL_IP, unix.IP_TTL, 4, 0), ancillary{}},
	}
	for _, tt := range tests {
		if got := parseAncillary(tt.oob); got != tt.want {
			t.Errorf("%s: %+v, want %+v", tt.name, got, tt.want)
		}
	}
}

// countingGuest counts datagrams and tells when they came.
type countingGuest struct{ got chan int }

func (g countingGuest) WriteDatagram(d flow.Datagram) error {
	n := 1
	if d.Segment > 0 {
		n = (len(d.Payload) + d.Segment - 1) / d.Segment
	}
	g.got <- n
	return nil
}
func (countingGuest) WriteEcho(flow.Echo) error   { return nil }
func (countingGuest) WriteError(flow.Error) error { return nil }

// BenchmarkUDP measures a round trip through a mapping to an echo server on loopback.
func BenchmarkUDP(b *testing.B) {
	for _, c := range []struct{ size, window int }{{64, 1}, {1200, 16}} {
		b.Run(fmt.Sprintf("%dB_%d_outstanding", c.size, c.window), func(b *testing.B) {
			g := countingGuest{make(chan int, 1024)}
			u := hostMaps(b, g, 0)
			server := echoServer(b, "127.0.0.1:0")
			d := flow.Datagram{Guest: guest1, Target: netip.AddrPortFrom(alias4, server.Port()), Payload: make([]byte, c.size), Hops: 63}
			b.ReportAllocs()
			out := 0
			for b.Loop() {
				if out++; out > c.window {
					out -= <-g.got
				}
				u.Datagram(d)
			}
			for ; out > 0; out -= <-g.got {
			}
		})
	}
}

// BenchmarkUDPNew measures a datagram that starts a mapping, and the end of one.
func BenchmarkUDPNew(b *testing.B) {
	u := hostMaps(b, countingGuest{make(chan int, 1<<20)}, 3000)
	sink, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer sink.Close()
	target := netip.AddrPortFrom(alias4, sink.LocalAddr().(*net.UDPAddr).AddrPort().Port())
	i := 0
	for b.Loop() {
		i++
		guest := netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 168, 65, byte(3 + i%3)}), uint16(i))
		u.Datagram(flow.Datagram{Guest: guest, Target: target, Hops: 63})
	}
}
