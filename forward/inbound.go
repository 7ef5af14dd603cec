package forward

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/slipway-net/slipway/internal/flow"
)

// Inbound is a published port as the bytes of its clients need it. It is constant.
type Inbound struct {
	Guest    netip.AddrPort // what clients reach in the guest
	Behind   netip.AddrPort // the container behind a specific address, where known
	Wildcard bool           // listens on all addresses of its family
	Direct   bool           // the engine lets packets from outside in to Behind, and to any Guest that is not its own address
	Either   bool           // Guest's port at the engine's address of the other family will do, too, where nobody serves at Guest
	Preserve bool           // the client's address is kept where possible
	Proxy    bool           // TCP connections begin with a PROXY protocol header of version 2
	UDPIdle  time.Duration  // of a client's mapping; zero means 90 s
	Count    InboundCounters
}

// InboundCounters are where a published port's events are counted. Any may be nil.
type InboundCounters struct {
	Clients *atomic.Uint64 // connections and UDP mappings so far
	Refused *atomic.Uint64 // clients that the guest refused, or did not answer
	Gateway *atomic.Uint64 // clients seen as the gateway although their own address was asked for
	Dropped *atomic.Uint64 // datagrams that were lost here
	Errors  *atomic.Uint64 // failed accepts and reads
}

// count adds one to one of the InboundCounters.
func count(c *atomic.Uint64) {
	if c != nil {
		c.Add(1)
	}
}

// Doors are the ways into the guest for what begins on the host. Their methods may be
// called by several goroutines.
type Doors interface {
	// Dial connects to the guest's to by the wire: packets come in by the guest's
	// device, as if from from. A from with port 0 takes any that is free. The error
	// wraps ECONNREFUSED, EHOSTUNREACH, or EADDRINUSE where from is connected to to
	// already.
	Dial(ctx context.Context, from, to netip.AddrPort) (flow.Conn, error)

	// Enter connects fd, a transparent socket of the guest's, to to from from by the wire,
	// as Dial does, and it is the event loop's thread that calls it. then is told later
	// on that thread, at most once: nil, or an error as Dial's, or ErrNoEntry where only
	// Dial can. cancel ends it; fd is the caller's. Enters reports whether it may work for
	// to. It is fast.
	Enter(fd int, from, to netip.AddrPort, then func(error)) (cancel func(), err error)
	Enters(to netip.AddrPort) bool

	// Has reports whether sockets of a kind can be had at all. It is fast.
	Has(SocketKind) bool
	// Socket returns a socket of the guest's namespace, which does not block and is
	// the caller's. Without wait it returns at once, and ErrNoneReady if there is
	// none at hand.
	Socket(k SocketKind, wait bool) (fd int, err error)

	// Where says where the guest's routes lead. It is fast.
	Where(netip.Addr) Place
	// Listens reports whether a socket of the guest's namespace waits for clients at an
	// address and port; false where nobody can tell. It is fast.
	Listens(flow.Proto, netip.AddrPort) bool
	Ends() Ends
}

// ErrNoneReady is returned by Doors.Socket when it would have to wait.
var ErrNoneReady = errors.New("no socket of the guest is at hand")

// ErrNoEntry is what Doors.Enter tells where no socket can take the client's place.
var ErrNoEntry = errors.New("no socket can take the client's place")

// Ends are the addresses of a guest's network. Those of a family that it has not are the
// zero Addr.
type Ends struct {
	Gateway4, Gateway6 netip.Addr
	Host4, Host6       netip.Addr // aliases of the host
	Guest4, Guest6     netip.Addr // the engine's own
}

// of returns the gateway and the engine of a's family.
func (e Ends) of(a netip.Addr) (gateway, guest netip.Addr) {
	if a.Is4() {
		return e.Gateway4, e.Guest4
	}
	return e.Gateway6, e.Guest6
}

// has reports whether a is one of e.
func (e Ends) has(a netip.Addr) bool {
	return a.IsValid() && (a == e.Gateway4 || a == e.Gateway6 || a == e.Host4 || a == e.Host6 || a == e.Guest4 || a == e.Guest6)
}

// port is to, alike for both addresses of the engine: what is dead is so in both.
func (e Ends) port(to netip.AddrPort) netip.AddrPort {
	if to.Addr() == e.Guest6 && e.Guest4.IsValid() {
		return netip.AddrPortFrom(e.Guest4, to.Port())
	}
	return to
}

// Place is where an address is, as the guest routes it.
type Place uint8

// The places.
const (
	Unknown  Place = iota // nobody can tell: the guest is not on this kernel
	Local                 // an address of the guest's namespace itself
	Inside                // on one of the guest's own networks
	Outside               // behind the guest's device: it comes to us
	Unrouted              // nowhere
)

// SocketKind is a kind of socket of the guest's namespace.
type SocketKind uint8

// The kinds. A transparent one may be bound to an address that the namespace has not:
// the gateway's or a client's, for which the rules of the kernel path keep the answers inside.
const (
	SocketTCP4 SocketKind = iota
	SocketTCP6
	SocketTransparent4
	SocketTransparent6
	SocketUDP4
	SocketUDP6
)

// forFamily returns the kind of a's family, given that of IPv4.
func (k SocketKind) forFamily(a netip.Addr) SocketKind {
	if a.Is4() {
		return k
	}
	return k + 1
}

// Way is how a client's bytes get into the guest.
type Way uint8

// The ways.
const (
	NoWay       Way = iota // not at all
	Wire                   // packets come in by the guest's device, see Doors.Dial and Enter
	Transparent            // a transparent socket of the guest's namespace
	Plain                  // an ordinary one, whose source address the guest chooses
)

// passage is how one client reaches the guest.
type passage struct {
	way      Way
	from, to netip.AddrPort // from is what the guest sees; the zero AddrPort for Plain; port 0 takes any
	indirect bool           // the wire does not lead to it
	// why says why from is not the client, where it was to be, or why there is no way.
	why string
}

// Why a source is not kept.
const (
	whyFamily    = "the client's address is of the other family"
	whyLinkLocal = "the client's address is link-local"
	whyGuests    = "the guest has the client's address itself"
	whyInside    = "the guest routes the client's address to a network of its own"
	whyUnrouted  = "the guest has no route to the client's address"
	whyNeverWire = "the client's address may not be on a wire"
	whyInUse     = "the client's port is connected to that port already"
	whyIndirect  = "slipway does not know that the engine lets packets from outside in to its containers"
	whyNotInside = "the port leads to an address that the guest has not"
)

// passage decides how client reaches the guest: docs/publish.md, row by row. The client
// has a zone only if the host's kernel gave it one, and is not v4-in-v6.
func (in *Inbound) passage(proto flow.Proto, client netip.AddrPort, d Doors) passage {
	to, container := in.reached(d.Ends())
	return in.passageTo(to, container, proto, client, d)
}

// passageTo is passage to one address, which may be a container's.
func (in *Inbound) passageTo(to netip.AddrPort, container bool, proto flow.Proto, client netip.AddrPort, d Doors) passage {
	if to.Addr().IsLoopback() {
		return passage{way: Plain, to: to, indirect: true}
	}
	place := d.Where(to.Addr())
	if !to.IsValid() || place == Outside || place == Unrouted {
		return passage{way: NoWay, to: to, why: whyNotInside}
	}
	p := passage{way: Wire, from: client, to: to, indirect: container && place != Local && !in.Direct}
	p.why = in.whyGateway(client.Addr(), p, d)
	if p.why == "" && in.keeps(client.Addr()) {
		return p
	}
	p.from = anyPortOf(to.Addr(), d.Ends())
	switch {
	case proto == flow.TCP && d.Has(SocketTransparent4.forFamily(to.Addr())):
		p.way = Transparent
	case p.indirect:
		p.way, p.from = Plain, netip.AddrPort{}
	}
	return p
}

// after is how else client may get into the guest when p failed with err. It is NoWay in the
// end.
func (in *Inbound) after(p passage, err error, proto flow.Proto, client netip.AddrPort, d Doors) passage {
	switch {
	case closedWay(err), p.within() && silence(err):
		return p.otherwise(client, d)
	case refusal(err):
		return in.second(p, proto, client, d)
	}
	return passage{way: NoWay}
}

// second leads to the engine's address of the other family when the guest has refused at the
// first: many a server is of one family, and the client, who is connected, cannot try
// the other any more. It is NoWay if p was the second, or there is none.
//
// It must not lead around the guest's firewall, which refuses by family and address. So a
// client with an address has to find that nobody serves in his family, rather than that he is
// not served. Those of the host's loopback are the gateway in both.
func (in *Inbound) second(p passage, proto flow.Proto, client netip.AddrPort, d Doors) passage {
	ends := d.Ends()
	first, _ := in.reached(ends)
	to := netip.AddrPortFrom(ends.Guest4, first.Port())
	if first.Addr().Is4() {
		to = netip.AddrPortFrom(ends.Guest6, first.Port())
	}
	switch {
	case !in.Either || p.to != first || !to.IsValid():
	case client.Addr().IsLoopback() || !d.Listens(proto, first) && d.Listens(proto, to):
		return in.passageTo(to, false, proto, client, d)
	}
	return passage{way: NoWay}
}

// within reports whether p stays inside the guest although another way is by the wire. The
// guest's own rules may drop what comes from within, of an address they do not know,
// and let in what comes from outside.
func (p passage) within() bool { return p.way == Transparent && !p.indirect }

// silence reports whether err is that nobody answered in time.
func silence(err error) bool {
	return errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded)
}

// refusal reports whether err is an answer rather than silence.
func refusal(err error) bool {
	return errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.EHOSTUNREACH) || errors.Is(err, syscall.ENETUNREACH)
}

// otherwise is how else client may get there when the way of p turned out not to be open:
// its own port is in use, or there is no socket, or no port left. It is NoWay in the end.
func (p passage) otherwise(client netip.AddrPort, d Doors) passage {
	gateway := anyPortOf(p.to.Addr(), d.Ends())
	switch {
	case p.way == Wire && p.from == client:
		p.from, p.why = gateway, whyInUse
	case p.way == Transparent && p.indirect:
		p.way, p.from = Plain, netip.AddrPort{}
	case p.way == Transparent:
		p.way, p.from = Wire, gateway
	default:
		p.way = NoWay
	}
	return p
}

// anyPortOf is the gateway in to's family.
func anyPortOf(to netip.Addr, ends Ends) netip.AddrPort {
	gateway, _ := ends.of(to)
	return netip.AddrPortFrom(gateway, 0)
}

// reached returns the address and port to reach, and whether it is one of a container
// rather than the engine's own.
func (in *Inbound) reached(ends Ends) (to netip.AddrPort, container bool) {
	if a := in.Guest.Addr(); a != ends.Guest4 && a != ends.Guest6 {
		return in.Guest, true
	}
	if !in.Behind.IsValid() {
		return in.Guest, false
	}
	if !in.Wildcard {
		return in.Behind, true
	}
	// The engine's own rules lead on to the container, in its family.
	if _, guest := ends.of(in.Behind.Addr()); guest.IsValid() {
		return netip.AddrPortFrom(guest, in.Guest.Port()), false
	}
	return in.Guest, false
}

// keeps reports whether the address of client is to be kept, if possible.
func (in *Inbound) keeps(client netip.Addr) bool {
	return in.Preserve && !in.Proxy && !client.IsLoopback()
}

// whyGateway says why client cannot be the source of p although it is to be; it is empty
// otherwise.
func (in *Inbound) whyGateway(client netip.Addr, p passage, d Doors) string {
	switch {
	case !in.keeps(client):
		return ""
	case p.indirect:
		return whyIndirect
	case client.Is4() != p.to.Addr().Is4():
		return whyFamily
	case client.IsLinkLocalUnicast() || client.Zone() != "":
		return whyLinkLocal
	case !onWire(client):
		return whyNeverWire
	case d.Ends().has(client):
		return whyGuests
	}
	switch d.Where(client) {
	case Local:
		return whyGuests
	case Inside:
		return whyInside
	case Unrouted:
		return whyUnrouted
	}
	return ""
}

// onWire reports whether a may be the source of a packet.
func onWire(a netip.Addr) bool {
	for i := range never {
		if never[i].prefix.Contains(a) {
			return false
		}
	}
	return !a.Is4In6()
}

// SetDoors tells f how to get into the guest. It comes before ServeTCP and ServeUDP.
func (f *Forwarder) SetDoors(d Doors) { f.in.doors = d }
