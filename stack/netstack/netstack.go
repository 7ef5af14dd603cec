// Package netstack ends a guest's TCP/IP in user space: it wires gVisor's stack to
// a link, asks the forwarder about every flow, and writes the guest the packets
// that belong to no connection. It is the only package, with link, that knows
// gVisor.
//
// New, Listen and ListenPacket for the gateway's services, then Run.
package netstack

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"github.com/slipway-net/slipway/internal/flow"
	"github.com/slipway-net/slipway/stack/link"
)

// Theory of operation.
//
// One goroutine reads the link (reader.go). It looks at each packet's IP header
// and sends it one of three ways:
//
//   - UDP datagrams and echo requests for anybody but the gateway, when they came
//     in one piece, go straight to the forwarder, which owns their sockets (udp.go,
//     icmp.go). gVisor never sees them: a UDP flow needs no state of a stack, and
//     the detour would cost as much as the rest of the way.
//   - packets that no host may send (martians) are counted and dropped.
//   - everything else is gVisor's: TCP, fragments, and what the gateway itself is
//     asked. Reassembled datagrams come back to us through transport handlers.
//
// A SYN for no known connection reaches tcpHandler (tcp.go), which asks the
// forwarder and only then lets gVisor answer. Dial (dial.go) is the other direction.
//
// Towards the guest there are two writers. What gVisor sends goes through a queue
// and one goroutine (endpoint.go), because writing under gVisor's endpoint lock makes
// the answer spin on that lock. Datagrams, echo replies and ICMP errors are
// complete packets that hold no lock and are written by the goroutine that brings
// them.

// nicID is gVisor's name for the link.
const nicID tcpip.NICID = 1

// Forwarder decides about the guest's flows and carries their bytes.
type Forwarder interface {
	// Decide says what becomes of a TCP connection. It may block for as long as
	// a connect does; ctx ends when the guest gave up. A Host in the Verdict is
	// the caller's, who passes it to Relay or aborts it.
	Decide(ctx context.Context, t flow.Tuple) flow.Verdict

	// Relay joins the guest's connection with v.Host until both have ended, and
	// closes them. It returns early when ctx ends.
	Relay(ctx context.Context, guest flow.Conn, v flow.Verdict)

	// Discard takes back a connecting Verdict that will not be relayed, because
	// the guest had gone when its handshake was answered.
	Discard(v flow.Verdict)

	// Datagram and Echo take what a guest sends. They must not block: they run on
	// the goroutine that reads the link.
	Datagram(d flow.Datagram)
	Echo(e flow.Echo)

	// Expects reports whether Datagram is to have what the guest sends to t's Target,
	// which is the gateway: the answers to clients that the guest knows by that address.
	// Rejected takes an ICMP error about a datagram that was written to the guest; From
	// is who reports it. Neither may block.
	Expects(t flow.Tuple) bool
	Rejected(e flow.Error)
}

// Config is what a Stack is made of. All fields but Log and MaxDials are
// needed.
type Config struct {
	Link     link.Link    // the Stack closes it at the end of Run
	Gateway4 netip.Addr   // our own address in the guest's subnet
	Gateway6 netip.Addr   //
	Log      *slog.Logger // nil discards

	// Poll, if not nil, has ready called on a thread of the caller's whenever the
	// link, which must be a link.TryReader, may have a packet, and again when it
	// returned true, until stop has returned. Without it Run reads the link.
	Poll func(ready func() (again bool)) (stop func(), err error)

	// Kernel, if not nil, is the kernel path, which needs Poll: all its methods and
	// what they call run on that thread. It is used once UseKernel says so.
	Kernel Kernel

	// MaxDials bounds the connections whose target is being dialled; one guest
	// address may use two thirds of them. Zero means 4096.
	MaxDials int
}

// defaultMaxDials is DESIGN's limit of in-flight dials. Each costs a goroutine, a
// host socket and a held SYN: about 16 KiB.
const defaultMaxDials = 4096

// Stack is one guest's network.
type Stack struct {
	cfg   Config
	log   *slog.Logger
	ip    *stack.Stack
	ep    *endpoint
	dials dials
	out   pendingDials
	bufs  buffers

	train      *train // nil unless Poll is used
	kernel     kernelPath
	kernelTodo atomic.Bool  // kernel has something to catch up with
	served     atomic.Int64 // connections that gVisor has

	clockStart time.Time // of tcpClock
	clockBase  uint32

	ident atomic.Uint32 // IPv4 identification and IPv6 fragment identification of our own packets
	stats counters

	forward Forwarder       // set by Run
	ctx     context.Context // Run's, for gVisor's callbacks, which pass none; ends when Run stops
	flows   sync.WaitGroup  // every goroutine that serves a guest's connection, and every Dial that waits
}

var _ flow.Guest = (*Stack)(nil)

// New makes a stack on cfg.Link. Nothing moves before Run.
func New(cfg Config) (*Stack, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.MaxDials == 0 {
		cfg.MaxDials = defaultMaxDials
	}
	s := &Stack{cfg: cfg, log: cfg.Log.With(slog.String("component", "netstack"))}
	s.kernel.Kernel = cfg.Kernel
	s.dials.init(cfg.MaxDials)
	s.ident.Store(rand.Uint32())
	s.clockStart, s.clockBase = time.Now(), rand.Uint32()
	s.ep = newEndpoint(cfg.Link, &s.stats)
	s.ip = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, ipv6.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4, icmp.NewProtocol6},
		HandleLocal:        false,
	})
	if err := s.setUp(); err != nil {
		s.ip.Destroy()
		return nil, err
	}
	return s, nil
}

// setUp configures gVisor: one interface that takes packets for any address and
// may send from any.
func (s *Stack) setUp() error {
	if err := s.tuneTCP(); err != nil {
		return err
	}
	// Handlers go in before the interface exists: gVisor reads them without a lock.
	s.setHandlers()
	opts := stack.NICOptions{}
	if terr := s.ip.CreateNICWithOptions(nicID, s.ep, opts); terr != nil {
		return fmt.Errorf("create interface: %s", terr)
	}
	for _, gw := range []netip.Addr{s.cfg.Gateway4, s.cfg.Gateway6} {
		if terr := s.ip.AddProtocolAddress(nicID, tcpip.ProtocolAddress{
			Protocol:          protocolOf(gw),
			AddressWithPrefix: toTCPIP(gw).WithPrefix(),
		}, stack.AddressProperties{}); terr != nil {
			return fmt.Errorf("add address %v: %s", gw, terr)
		}
	}
	s.ip.SetRouteTable([]tcpip.Route{
		{Destination: header.IPv4EmptySubnet, NIC: nicID},
		{Destination: header.IPv6EmptySubnet, NIC: nicID},
	})
	if terr := s.ip.SetPromiscuousMode(nicID, true); terr != nil {
		return fmt.Errorf("set promiscuous mode: %s", terr)
	}
	if terr := s.ip.SetSpoofing(nicID, true); terr != nil {
		return fmt.Errorf("set spoofing: %s", terr)
	}
	return nil
}

// timeWait is how long gVisor remembers a connection that we closed first. Its
// purpose is to catch segments that wander in the network; ours is a queue in one
// kernel, so a second is long, and a guest's 20,000 connections a second would
// otherwise leave more than a million entries.
const timeWait = time.Second

func (s *Stack) tuneTCP() error {
	tw := tcpip.TCPTimeWaitTimeoutOption(timeWait)
	sack := tcpip.TCPSACKEnabled(true)
	moderate := tcpip.TCPModerateReceiveBufferOption(false)
	rcv := tcpip.TCPReceiveBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: bufMost, Max: bufMost}
	snd := tcpip.TCPSendBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: bufMost, Max: bufMost}
	for _, o := range []tcpip.SettableTransportProtocolOption{&tw, &sack, &moderate, &rcv, &snd} {
		if terr := s.ip.SetTransportProtocolOption(tcp.ProtocolNumber, o); terr != nil {
			return fmt.Errorf("set tcp option %T: %s", o, terr)
		}
	}
	return nil
}

// Run carries packets until ctx ends or the link fails, then ends every connection
// and waits for it. It closes the link, and returns nil if and only if ctx ended.
// It is called once.
func (s *Stack) Run(ctx context.Context, f Forwarder) error {
	ctx, cancel := context.WithCancel(ctx)
	s.forward, s.ctx = f, ctx

	var loops sync.WaitGroup
	loops.Go(s.ep.writeLoop)
	loops.Go(func() { s.dials.sweepLoop(ctx, func() { s.stats.gaveUp.Add(1) }) })
	failed := make(chan error, 1)
	stop := func() {}
	if s.cfg.Poll == nil {
		loops.Go(func() { failed <- s.readLoop() })
	} else {
		stop = s.poll(failed)
	}

	var err error
	select {
	case <-ctx.Done():
	case err = <-failed:
	}
	// The link is still written, and read if it can be, while connections end, so
	// that the guest hears of it.
	cancel()
	s.dials.close()
	s.endFlows()
	s.ep.closeQueue()
	s.ep.drained.Wait()
	stop()
	s.cfg.Link.Close()
	loops.Wait()
	s.ip.Destroy()
	return err
}

// endFlows resets what is left, handshakes included, and waits for it. A dial that
// succeeded in the last moment may begin a handshake after gVisor was closed and would
// wait for it in vain: so close until all have ended.
func (s *Stack) endFlows() {
	ended := make(chan struct{})
	go func() {
		s.flows.Wait()
		close(ended)
	}()
	again := time.NewTicker(closeEvery)
	defer again.Stop()
	for {
		s.ip.Close()
		select {
		case <-ended:
			return
		case <-again.C:
		}
	}
}

// closeEvery is how often endFlows looks for late handshakes.
const closeEvery = 50 * time.Millisecond

// toTCPIP and fromTCPIP convert between the address types, the only place that
// does.
func toTCPIP(a netip.Addr) tcpip.Address { return tcpip.AddrFromSlice(a.AsSlice()) }

func fromTCPIP(a tcpip.Address) netip.Addr {
	ip, _ := netip.AddrFromSlice(a.AsSlice())
	return ip
}

func protocolOf(a netip.Addr) tcpip.NetworkProtocolNumber {
	if a.Is4() {
		return ipv4.ProtocolNumber
	}
	return ipv6.ProtocolNumber
}
