package publish

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/slipway-net/slipway/internal/flow"
)

// portTries is how many ports of the host's choice are tried until both families can
// have one. One other listener among all ports fails a try with 1 in 28,000.
const portTries = 10

// socket is one listening socket: ln for TCP, udp for UDP.
type socket struct {
	ln   *net.TCPListener
	udp  *net.UDPConn
	at   netip.AddrPort
	dual bool // an inherited one for both families
}

func (s socket) close() error {
	if s.ln != nil {
		return s.ln.Close()
	}
	return s.udp.Close()
}

func (s socket) serve(c Carrier, p *Port) (io.Closer, error) {
	if s.ln != nil {
		return c.ServeTCP(s.ln, p)
	}
	return c.ServeUDP(s.udp, p)
}

// open listens for e, fills in e.port and hands the sockets to the Carrier. When it
// fails nothing is left of it.
func (b *Book) open(e *entry) (err error) {
	if e.sockets, err = b.listenAll(e); err != nil {
		return err
	}
	if len(e.sockets) == 0 {
		b.cfg.Log.Info("published without a listener: the host has no such addresses", "port", e.asked, "owner", e.owner())
	}
	e.port = b.describe(e)
	for _, s := range e.sockets {
		c, err := s.serve(b.cfg.Carrier, e.port)
		if err != nil {
			e.close()
			return &listenError{s.at, err}
		}
		e.closers = append(e.closers, c)
	}
	return nil
}

// close ends the Carrier's work first, so that nobody uses a descriptor that is closed.
func (e *entry) close() {
	for _, c := range e.closers {
		c.Close()
	}
	for _, s := range e.sockets {
		s.close()
	}
	e.closers, e.sockets = nil, nil
}

// describe makes the Port of e, whose sockets listen.
func (b *Book) describe(e *entry) *Port {
	p := &Port{
		ID: b.lastID.Add(1), Spec: e.asked, Since: time.Now(), asked: e.asked,
		guest4: b.cfg.Guest4, guest6: b.cfg.Guest6,
		Wildcard: wildcard(e.asked),
	}
	p.owner.Store(e.owner())
	for _, s := range e.sockets {
		p.Listens = append(p.Listens, s.at)
		p.dual = p.dual || s.dual
	}
	if len(p.Listens) > 0 {
		p.Spec.Host = netip.AddrPortFrom(e.asked.Host.Addr(), p.Listens[0].Port())
	}
	if p.Spec.Guest.Port() == 0 {
		p.Spec.Guest = netip.AddrPortFrom(p.Spec.Guest.Addr(), p.Spec.Host.Port())
	}
	p.Spec.Guest = p.GuestFor(e.claims[0].Addr())
	p.Spec.Source = e.source
	return p
}

// listenError is a system's error about one address.
type listenError struct {
	at  netip.AddrPort
	err error
}

func (e *listenError) Error() string { return fmt.Sprintf("listen on %v: %v", e.at, e.err) }
func (e *listenError) Unwrap() error { return e.err }

// listenAll opens the sockets of e, all with one port.
func (b *Book) listenAll(e *entry) ([]socket, error) {
	for try := 1; ; try++ {
		socks, err := b.listenOnce(e)
		if err == nil || e.asked.Host.Port() != 0 || try == portTries || !errors.Is(err, errInUse) {
			return socks, err
		}
	}
}

// listenOnce opens a socket for each claim of e. The port that the host chooses for the
// first is asked for again for the second. All addresses of a family that the host
// lacks are none: then there is nothing to listen on, and that is no error. (dockerd
// asks for [::] of its own accord, and would not start the container.)
func (b *Book) listenOnce(e *entry) (socks []socket, err error) {
	if s, ok := b.inheritedDual(e.asked.Proto, e.claims); ok {
		return []socket{s}, nil
	}
	var lacks error
	port := e.asked.Host.Port()
	for _, c := range e.claims {
		s, err := b.listen(e.asked.Proto, netip.AddrPortFrom(c.Addr(), port))
		if err != nil && wildcard(e.asked) && lacksFamily(c.Addr(), err) {
			lacks = err
			continue
		}
		if err != nil {
			for _, s := range socks {
				s.close()
			}
			return nil, err
		}
		socks = append(socks, s)
		port = s.at.Port()
	}
	if len(socks) == 0 && (port == 0 || len(e.claims) > 1) {
		return nil, lacks
	}
	return socks, nil
}

// lacksFamily reports whether err, for a wildcard address or the loopback address
// in its place, says that the host does not do that family.
func lacksFamily(a netip.Addr, err error) bool {
	return errors.Is(err, errNoFamily) || a.IsLoopback() && errors.Is(err, errNoAddress)
}

// listen opens the socket of one family on one address. "tcp6" and "udp6" are IPv6 only
// (IPV6_V6ONLY), so that 0.0.0.0 and [::] are two ports.
func (b *Book) listen(proto flow.Proto, at netip.AddrPort) (s socket, err error) {
	if s, ok := b.inheritedAt(proto, at); ok {
		return s, nil
	}
	network := proto.String() + "6"
	if at.Addr().Is4() {
		network = proto.String() + "4"
	}
	// Neither call waits for anything, so there is nothing that a context could end.
	// Go makes MPTCP listeners unless told otherwise: their connections cannot be spliced
	// as plain TCP, and nobody asked for them.
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	if proto == flow.TCP {
		ln, err := lc.Listen(context.Background(), network, at.String())
		if err != nil {
			return s, &listenError{at, reason(err)}
		}
		s.ln = ln.(*net.TCPListener)
		s.at = ln.Addr().(*net.TCPAddr).AddrPort()
	} else {
		c, err := lc.ListenPacket(context.Background(), network, at.String())
		if err != nil {
			return s, &listenError{at, reason(err)}
		}
		s.udp = c.(*net.UDPConn)
		s.at = c.LocalAddr().(*net.UDPAddr).AddrPort()
	}
	s.at = unmap(s.at)
	return s, nil
}

// reason is the system's word of an error of package net, which repeats the address.
func reason(err error) error {
	if sys := new(os.SyscallError); errors.As(err, &sys) {
		return sys.Err
	}
	if op := new(net.OpError); errors.As(err, &op) {
		return op.Err
	}
	return err
}

// explain makes of what failed for e the error that Add returns.
func (b *Book) explain(e *entry, owner string, err error) error {
	failed := new(listenError)
	if !errors.As(err, &failed) {
		return err
	}
	spec := e.asked
	spec.Host = failed.at
	taken := errors.Is(err, errInUse) || errors.Is(err, os.ErrPermission) // a low port says that first
	if in, ok := b.inheritedBeside(spec.Proto, failed.at); ok && taken {
		listen := map[flow.Proto]string{flow.TCP: "ListenStream", flow.UDP: "ListenDatagram"}[spec.Proto]
		return &ConflictError{spec, in, fmt.Sprintf("publish what is passed on, or have just this address passed on (%s=%v, BindIPv6Only=ipv6-only)", listen, failed.at)}
	}
	switch {
	case errors.Is(err, errInUse):
		return b.inUse(owner, spec)
	case errors.Is(err, errNoAddress):
		return &SpecError{spec, fmt.Sprintf("%v is not an address of this host", failed.at.Addr()), ""}
	case errors.Is(err, errNoFamily):
		return &SpecError{spec, "this host does not do that address family", ""}
	case errors.Is(err, os.ErrPermission):
		return denied(spec)
	case errors.Is(err, errNoFiles[0]), errors.Is(err, errNoFiles[1]):
		return &limitError{spec, failed.err.Error(), hintFiles}
	}
	return fmt.Errorf("publish %s: %w", name(spec), failed.err)
}

// inUse names the holder of an address that owner could not have.
func (b *Book) inUse(owner string, spec flow.PortSpec) error {
	if spec.Host.Port() == 0 {
		return &limitError{spec, "the host has no free port", ""}
	}
	if err := b.inUseHere(owner, spec); err != nil {
		return err
	}
	return &ConflictError{spec, b.holders.find(spec.Proto, spec.Host), "stop what has it, or publish another host port (0: any)"}
}

// inUseHere is inUse where the holder is one of the Book's own ports, else nil.
func (b *Book) inUseHere(owner string, spec flow.PortSpec) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if e := b.conflictLocked(owner, spec.Proto, []netip.AddrPort{spec.Host}); e != nil {
		return e.conflict(spec, []netip.AddrPort{spec.Host}, b.differsLocked(e, owner, spec))
	}
	return nil
}

// conflict is the error of somebody who asked for what e has. How that differs is "" where
// there is more to it.
func (e *entry) conflict(asked flow.PortSpec, claims []netip.AddrPort, differs string) error {
	i := slices.IndexFunc(claims, func(c netip.AddrPort) bool {
		return slices.ContainsFunc(e.claims, func(d netip.AddrPort) bool { return Overlap(c.Addr(), d.Addr()) })
	})
	asked.Host = claims[max(i, 0)]
	return &ConflictError{asked, Published{e.asked, e.owner(), differs},
		"slipway ports ls shows it, slipway ports rm withdraws it"}
}

// denied is the error of a port that the process may not listen on.
func denied(spec flow.PortSpec) error {
	e := &PolicyError{spec, "permission denied", ""}
	if first := unprivilegedPorts(); first > int(spec.Host.Port()) {
		program, err := os.Executable()
		if err != nil {
			program = "slipway"
		}
		e.Why = fmt.Sprintf("ports below %d need root or CAP_NET_BIND_SERVICE", first)
		e.hint = fmt.Sprintf("sudo sysctl net.ipv4.ip_unprivileged_port_start=%d, or sudo setcap cap_net_bind_service=+ep %s", spec.Host.Port(), program)
	}
	return e
}
