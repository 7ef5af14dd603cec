package netstack

import (
	"bytes"
	"context"
	"net/netip"
	"sync"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/slipway-net/slipway/internal/flow"
	"github.com/slipway-net/slipway/stack/link"
)

// fakeKernel is a kernel path whose dials and answers a test decides. then of a dial
// that decide leaves open comes by finish.
type fakeKernel struct {
	decide func(t flow.Tuple) (v flow.Verdict, now bool)
	accept bool // the guest's kernel completes handshakes
	live   func(t flow.Tuple) bool

	mu        sync.Mutex
	open      map[flow.Tuple]func(flow.Verdict)
	answered  [][]byte // SYNs that were given back
	cancelled int
	todo      []func() // for the polling goroutine
}

func (k *fakeKernel) Begin(t flow.Tuple, then func(flow.Verdict)) func() {
	v, now := k.decide(t)
	if v.Answer == flow.Connect {
		v.Host, v.Flow = &stalledHost{aborted: make(chan struct{})}, &flow.Flow{Tuple: t, Path: flow.Kernel}
	}
	if now {
		then(v)
		return nil
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.open[t] = then
	return func() {
		k.do(func() {
			k.mu.Lock()
			_, ok := k.open[t]
			delete(k.open, t)
			k.cancelled++
			k.mu.Unlock()
			if ok {
				then(flow.Verdict{Answer: flow.Silence})
			}
		})
	}
}

func (k *fakeKernel) Answer(_ flow.Tuple, syn []byte, _ link.Header, _ flow.Verdict, then func(bool)) {
	k.mu.Lock()
	k.answered = append(k.answered, bytes.Clone(syn))
	k.mu.Unlock()
	then(k.accept)
}

func (k *fakeKernel) Live(t flow.Tuple) bool { return k.live != nil && k.live(t) }

func (k *fakeKernel) Do(f func()) bool {
	done := make(chan struct{})
	k.do(func() { f(); close(done) })
	<-done
	return true
}

func (k *fakeKernel) do(f func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.todo = append(k.todo, f)
}

// drain runs what do was given.
func (k *fakeKernel) drain() {
	k.mu.Lock()
	todo := k.todo
	k.todo = nil
	k.mu.Unlock()
	for _, f := range todo {
		f()
	}
}

// poll is a Config.Poll that asks every now and then.
func (k *fakeKernel) poll(ready func() bool) (func(), error) {
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			k.drain()
			for ready() {
			}
			select {
			case <-stop:
				return
			case <-time.After(200 * time.Microsecond):
			}
		}
	}()
	return func() { close(stop); <-done }, nil
}

// state counts under the lock.
func (k *fakeKernel) counts() (answered, cancelled int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.answered), k.cancelled
}

// startKernel runs a Stack with k for its kernel path.
func startKernel(t *testing.T, k *fakeKernel) *bench {
	t.Helper()
	k.open = make(map[flow.Tuple]func(flow.Verdict))
	b := start(t, 1500, func(c *Config) { c.Poll, c.Kernel = k.poll, k })
	b.UseKernel(true, true)
	return b
}

func always(v flow.Verdict) func(flow.Tuple) (flow.Verdict, bool) {
	return func(flow.Tuple) (flow.Verdict, bool) { return v, true }
}

func TestKernelAnswersTheSameSYN(t *testing.T) {
	for _, f := range families {
		k := &fakeKernel{decide: always(flow.Verdict{Answer: flow.Connect}), accept: true}
		b := startKernel(t, k)
		pkt := syn(f.guest, f.target)
		b.send(link.Header{}, pkt)
		waitFor(t, "an answer", func() bool { n, _ := k.counts(); return n == 1 })
		if !bytes.Equal(k.answered[0], pkt) {
			t.Errorf("%s: % x was given back for % x", f.name, k.answered[0], pkt)
		}
		waitFor(t, "the hold's end", func() bool { return b.dials.len() == 0 })
	}
}

func TestKernelRefusal(t *testing.T) {
	for _, f := range families {
		b := startKernel(t, &fakeKernel{decide: always(flow.Verdict{Answer: flow.Reset})})
		b.send(link.Header{}, syn(f.guest, f.target))
		pkt, _ := b.receive()
		h := header.TCP(pkt[ipHeaderLen(f.target.Addr()):])
		if h.Flags() != header.TCPFlagRst|header.TCPFlagAck || h.AckNumber() != synSeq+1 || h.SourcePort() != f.target.Port() || h.DestinationPort() != f.guest.Port() {
			t.Errorf("%s: flags %v, acknowledges %d", f.name, h.Flags(), h.AckNumber())
		}
		if !tcpChecksumOK(&ipInfo{src: f.target.Addr(), dst: f.guest.Addr()}, h) {
			t.Errorf("%s: wrong checksum", f.name)
		}
	}
}

func TestKernelUnreachable(t *testing.T) {
	b := startKernel(t, &fakeKernel{decide: always(flow.Verdict{Answer: flow.Unreachable, ICMP: flow.ICMP{Type: 3, Code: 13}})})
	b.send(link.Header{}, syn(families[0].guest, families[0].target))
	pkt, _ := b.receive()
	if h := header.ICMPv4(pkt[header.IPv4MinimumSize:]); header.IPv4(pkt).Protocol() != uint8(header.ICMPv4ProtocolNumber) || h.Type() != 3 || h.Code() != 13 {
		t.Errorf("got type %d code %d", h.Type(), h.Code())
	}
}

func TestKernelRepeatedSYNIsHeldOnce(t *testing.T) {
	var begun int
	k := &fakeKernel{accept: true}
	k.decide = func(flow.Tuple) (flow.Verdict, bool) { begun++; return flow.Verdict{}, false }
	b := startKernel(t, k)
	f := families[0]
	for range 3 {
		b.send(link.Header{}, syn(f.guest, f.target))
	}
	waitFor(t, "a dial", func() bool { return b.dials.len() == 1 })
	waitFor(t, "three packets", func() bool { return b.Stats().FromGuestPackets == 3 })
	k.do(func() {
		if begun != 1 {
			t.Errorf("%d dials", begun)
		}
		k.mu.Lock()
		then := k.open[flow.Tuple{Proto: flow.TCP, Guest: f.guest, Target: f.target}]
		clear(k.open)
		k.mu.Unlock()
		then(flow.Verdict{Answer: flow.Connect, Host: &stalledHost{aborted: make(chan struct{})}, Flow: new(flow.Flow)})
	})
	waitFor(t, "an answer", func() bool { n, _ := k.counts(); return n == 1 })
}

func TestKernelGuestResetsWhileHeld(t *testing.T) {
	k := &fakeKernel{}
	k.decide = func(flow.Tuple) (flow.Verdict, bool) { return flow.Verdict{}, false }
	b := startKernel(t, k)
	f := families[0]
	b.send(link.Header{}, syn(f.guest, f.target))
	waitFor(t, "a dial", func() bool { return b.dials.len() == 1 })
	b.send(link.Header{}, segment(f.guest, f.target, header.TCPFields{SeqNum: synSeq + 1, Flags: header.TCPFlagRst}))
	waitFor(t, "the end of the dial", func() bool { return b.dials.len() == 0 })
	if _, n := k.counts(); n != 1 {
		t.Errorf("cancelled %d times", n)
	}
}

// TestKernelDetour has a guest whose own rules let no answer through: its repeated SYN
// is gVisor's, and its next connection at once.
func TestKernelDetour(t *testing.T) {
	k := &fakeKernel{decide: always(flow.Verdict{Answer: flow.Connect})}
	b := startKernel(t, k)
	b.fwd.decide = func(context.Context, flow.Tuple) flow.Verdict { return flow.Verdict{Answer: flow.Connect} }
	b.fwd.relay = echoRelay
	g := guestStack(b)
	for i := range 2 {
		c, err := dialGuest(t, g, families[0].target)
		if err != nil {
			t.Fatal(err)
		}
		c.Write([]byte("x"))
		if n, err := c.Read(make([]byte, 1)); n != 1 {
			t.Errorf("connection %d: %v", i, err)
		}
		c.Close()
	}
	if n, _ := k.counts(); n != 1 || b.Stats().Detours != 1 {
		t.Errorf("%d SYNs were given back, %d detours", n, b.Stats().Detours)
	}
}

// TestKernelDetourGivenUp has the guest not repeat its SYN: the host's socket goes.
func TestKernelDetourGivenUp(t *testing.T) {
	k := &fakeKernel{decide: always(flow.Verdict{Answer: flow.Connect})}
	b := startKernel(t, k)
	f := families[0]
	b.send(link.Header{}, syn(f.guest, f.target))
	waitFor(t, "a detour", func() bool { return b.Stats().Detours == 1 })
	b.send(link.Header{}, segment(f.guest, f.target, header.TCPFields{SeqNum: synSeq + 1, Flags: header.TCPFlagRst}))
	waitFor(t, "the discarded verdict", func() bool {
		b.fwd.mu.Lock()
		defer b.fwd.mu.Unlock()
		return b.fwd.discarded == 1
	})
	waitFor(t, "the hold's end", func() bool { return b.dials.len() == 0 })
}

func TestKernelLeavesOthersAlone(t *testing.T) {
	k := &fakeKernel{decide: always(flow.Verdict{Answer: flow.Connect}), accept: true}
	b := startKernel(t, k)
	f := families[0]
	b.send(link.Header{}, segment(f.guest, f.target, header.TCPFields{SeqNum: 1, AckNum: 1, Flags: header.TCPFlagAck}))
	b.receive() // a RST
	b.UseKernel(false, true)
	b.fwd.decide = func(context.Context, flow.Tuple) flow.Verdict { return flow.Verdict{Answer: flow.Reset} }
	b.send(link.Header{}, syn(f.guest, f.target))
	b.receive() // gVisor's RST
	if n, _ := k.counts(); n != 0 {
		t.Errorf("%d SYNs were given back", n)
	}
}

// TestKernelGivesBack has segments of a connection that the guest's kernel has come out.
func TestKernelGivesBack(t *testing.T) {
	k := &fakeKernel{decide: always(flow.Verdict{Answer: flow.Connect}), live: func(flow.Tuple) bool { return true }}
	b := startKernel(t, k)
	f := families[0]
	long := ipPacket(f.guest.Addr(), f.target.Addr(), header.TCPProtocolNumber, append(segment(f.guest, f.target,
		header.TCPFields{SeqNum: 1, AckNum: 1, Flags: header.TCPFlagAck})[header.IPv4MinimumSize:], pattern(3000)...))
	for _, pkt := range [][]byte{syn(f.guest, f.target), long} {
		b.send(link.Header{Flags: link.DataValid}, pkt)
		if got, h := b.receive(); !bytes.Equal(got, pkt) || h.Flags != link.DataValid {
			t.Errorf("%d bytes came back for %d", len(got), len(pkt))
		}
	}
	if n, _ := k.counts(); n != 0 || b.dials.len() != 0 || b.Stats().GivenBack != 2 {
		t.Errorf("%d answers, %d dials, %d given back", n, b.dials.len(), b.Stats().GivenBack)
	}
}

func TestProbeKernel(t *testing.T) {
	k := &fakeKernel{accept: true}
	b := startKernel(t, k)
	b.UseKernel(false, false)
	f := families[0]
	gateway := netip.AddrPortFrom(gw4, 9)
	ok := make(chan bool, 1)
	b.ProbeKernel(flow.Tuple{Proto: flow.TCP, Guest: f.guest, Target: gateway}, func(good bool) { ok <- good })
	b.send(link.Header{}, syn(f.guest, gateway))
	if !next(t, ok) {
		t.Error("the probe failed")
	}
}
