package publish

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/slipway-net/slipway/internal/flow"
)

// inherited is a socket that a service manager passed on. It is kept open while it is
// not in use, as the service manager itself keeps it; clients wait in its queue then.
type inherited struct {
	file  *os.File
	proto flow.Proto
	at    netip.AddrPort
	dual  bool // listens on the addresses of IPv4, too
}

// inherit examines files and closes those that cannot be used.
func inherit(files []*os.File, log *slog.Logger) []inherited {
	var all []inherited
	for _, f := range files {
		in, err := examine(f)
		if err != nil {
			log.Warn("a socket that was passed on is not used", "socket", f.Name(), "error", err)
			f.Close()
			continue
		}
		all = append(all, in)
	}
	return all
}

// examine tells what f is.
func examine(f *os.File) (in inherited, err error) {
	in.file = f
	raw, err := f.SyscallConn()
	if err != nil {
		return in, err
	}
	if ctl := raw.Control(func(fd uintptr) { err = in.ask(int(fd)) }); ctl != nil {
		return in, ctl
	}
	return in, err
}

func (in *inherited) ask(fd int) error {
	kind, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil {
		return os.NewSyscallError("getsockopt", err)
	}
	switch kind {
	case unix.SOCK_STREAM:
		in.proto = flow.TCP
		if listens, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN); err != nil || listens == 0 {
			return errors.New("it does not listen")
		}
	case unix.SOCK_DGRAM:
		in.proto = flow.UDP
		if _, err := unix.Getpeername(fd); err == nil {
			return errors.New("it is connected")
		}
	default:
		return fmt.Errorf("socket type %d is not published", kind)
	}
	own, err := unix.Getsockname(fd)
	if err != nil {
		return os.NewSyscallError("getsockname", err)
	}
	switch own := own.(type) {
	case *unix.SockaddrInet4:
		in.at = netip.AddrPortFrom(netip.AddrFrom4(own.Addr), uint16(own.Port))
	case *unix.SockaddrInet6:
		only, err := unix.GetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY)
		if err != nil {
			return os.NewSyscallError("getsockopt", err)
		}
		in.at = unmap(netip.AddrPortFrom(netip.AddrFrom16(own.Addr), uint16(own.Port)))
		in.dual = only == 0 && in.at.Addr() == any6
	default:
		return errors.New("it is neither IPv4 nor IPv6")
	}
	if in.at.Port() == 0 {
		return errors.New("it is not bound")
	}
	return nil
}

// inheritedAt returns a socket that was passed on for just this address.
func (b *Book) inheritedAt(proto flow.Proto, at netip.AddrPort) (socket, bool) {
	return b.passed(func(in inherited) bool { return in.proto == proto && in.at == at && !in.dual })
}

// inheritedDual returns the one socket for all addresses of both families that systemd
// passes on for ListenStream=80, if those are claimed.
func (b *Book) inheritedDual(proto flow.Proto, claims []netip.AddrPort) (socket, bool) {
	if len(claims) != 2 || claims[0].Addr() != any4 {
		return socket{}, false
	}
	return b.passed(func(in inherited) bool { return in.proto == proto && in.at == claims[1] && in.dual })
}

// inheritedBeside returns the socket that was passed on and keeps at from being bound,
// since it is for more than at, or for less.
func (b *Book) inheritedBeside(proto flow.Proto, at netip.AddrPort) (PassedOn, bool) {
	b.mu.Lock() // nothing keeps Close from closing them
	defer b.mu.Unlock()
	i := slices.IndexFunc(b.inherited, func(in inherited) bool {
		wide := in.at.Addr().Is4() == at.Addr().Is4() && (in.at.Addr().IsUnspecified() || at.Addr().IsUnspecified())
		return in.proto == proto && in.at.Port() == at.Port() && (in.dual || wide)
	})
	if i < 0 {
		return PassedOn{}, false
	}
	return PassedOn{b.inherited[i].at, b.inherited[i].dual}, true
}

// passed duplicates the first inherited socket that fits. Conflicts were ruled out
// before, so it is nobody else's.
func (b *Book) passed(fits func(inherited) bool) (s socket, ok bool) {
	i := slices.IndexFunc(b.inherited, fits)
	if i < 0 {
		return s, false
	}
	in := b.inherited[i]
	s.at, s.dual = in.at, in.dual
	var err error
	if in.proto == flow.TCP {
		var ln net.Listener
		if ln, err = net.FileListener(in.file); err == nil {
			s.ln = ln.(*net.TCPListener)
		}
	} else {
		var c net.PacketConn
		if c, err = net.FilePacketConn(in.file); err == nil {
			s.udp = c.(*net.UDPConn)
		}
	}
	if err != nil {
		b.cfg.Log.Warn("a socket that was passed on is not used", "socket", in.file.Name(), "error", err)
	}
	return s, err == nil
}
