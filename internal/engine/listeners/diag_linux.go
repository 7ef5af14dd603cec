package listeners

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/slipway-net/slipway/internal/flow"
)

// Messages of sock_diag(7), from linux/inet_diag.h. Numbers are in the host's byte order
// but for ports and addresses. A socket is named alike in requests and answers:
//
//	request: family, protocol, extensions, -, states (4), socket (48)
//	answer:  family, state, timer, retransmissions, socket (48), five numbers (20), attributes
//	socket:  port (2), peer's port (2), address (16), peer's address (16), device (4), cookie (8)
const (
	sockDiagByFamily = 20
	requestLen       = 56
	answerLen        = 72
	socketAt         = 4 // in an answer
	addressAt        = socketAt + 4
	cookieAt         = socketAt + 40
	attrOnly6        = 11 // INET_DIAG_SKV6ONLY, one byte

	// States, from net/tcp_states.h. A UDP socket that is not connected is closed.
	stateClose  = 7
	stateListen = 10

	// dumpBuffer takes what the kernel puts into one datagram of a dump
	// (net/netlink/af_netlink.c, netlink_dump).
	dumpBuffer = 32 << 10

	// maxSockets is what is looked at of one protocol and family.
	maxSockets = 16384

	// maxParts is how many datagrams are read for one question. A million sockets
	// are 3,000; an engine's root may send us its own without end.
	maxParts = 16384
)

// Diag reads the sockets of the network namespace that its own socket is of.
type Diag struct {
	f   *os.File
	seq uint32
	buf []byte
}

// NewDiag makes one of a socket of the engine's namespace, of the family AF_NETLINK and the
// protocol NETLINK_INET_DIAG. It is the Diag's from now on.
func NewDiag(f *os.File) *Diag { return &Diag{f: f, buf: make([]byte, dumpBuffer)} }

// Close closes the socket, which keeps the namespace from ending.
func (d *Diag) Close() error { return d.f.Close() }

// Read calls found for what waits for clients. It does not block, and is not to be called
// by two goroutines at one time.
func (d *Diag) Read(found func(Socket)) error {
	for _, q := range []struct {
		proto flow.Proto
		state uint
	}{{flow.TCP, stateListen}, {flow.UDP, stateClose}} {
		for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
			err := d.dump(q.proto, family, 1<<q.state, found)
			switch {
			case errors.Is(err, unix.ENOENT):
				return fmt.Errorf("the kernel lacks %v_diag (modprobe %[1]v_diag on the host)", q.proto)
			case err != nil:
				return fmt.Errorf("read %v sockets: %w", q.proto, err)
			}
		}
	}
	return nil
}

// dump asks for the sockets of a protocol and family in some states.
func (d *Diag) dump(proto flow.Proto, family byte, states uint32, found func(Socket)) error {
	raw, err := d.f.SyscallConn()
	if err != nil {
		return err
	}
	var asked error
	if err := raw.Control(func(fd uintptr) { asked = d.ask(int(fd), proto, family, states, found) }); err != nil {
		return err
	}
	return asked
}

func (d *Diag) ask(fd int, proto flow.Proto, family byte, states uint32, found func(Socket)) error {
	d.seq++
	if err := unix.Sendto(fd, request(d.seq, proto, family, states), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	left := maxSockets
	for range maxParts {
		// The kernel has the answer ready when it has taken the question, and each
		// part of it when the one before has been read.
		n, from, err := unix.Recvfrom(fd, d.buf, unix.MSG_DONTWAIT)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		if !fromKernel(from) {
			continue
		}
		messages, err := syscall.ParseNetlinkMessage(d.buf[:n])
		if err != nil {
			return err
		}
		for _, m := range messages {
			switch {
			case m.Header.Seq != d.seq: // left over from one that failed
			case m.Header.Type == unix.NLMSG_DONE, m.Header.Type == unix.NLMSG_ERROR:
				return result(m.Data)
			default:
				if s, ok := parse(m.Data, proto); ok && left > 0 {
					left--
					found(s)
				}
			}
		}
	}
	return errEndless
}

// errEndless ends an answer that does not end.
var errEndless = errors.New("the answer does not end")

// fromKernel tells the kernel's messages, whose port is 0, from those of somebody who has
// CAP_NET_ADMIN in the namespace and sends to our port.
func fromKernel(from unix.Sockaddr) bool {
	a, ok := from.(*unix.SockaddrNetlink)
	return ok && a.Pid == 0
}

// request makes a message for one dump.
func request(seq uint32, proto flow.Proto, family byte, states uint32) []byte {
	number := byte(unix.IPPROTO_TCP)
	if proto == flow.UDP {
		number = unix.IPPROTO_UDP
	}
	b := make([]byte, 0, unix.SizeofNlMsghdr+requestLen)
	b = binary.NativeEndian.AppendUint32(b, unix.SizeofNlMsghdr+requestLen)
	b = binary.NativeEndian.AppendUint16(b, sockDiagByFamily)
	b = binary.NativeEndian.AppendUint16(b, unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	b = binary.NativeEndian.AppendUint32(b, seq)
	b = append(b, 0, 0, 0, 0, family, number, 0, 0)
	b = binary.NativeEndian.AppendUint32(b, states)
	return b[:cap(b)] // any socket
}

// result is the error at the end of a dump.
func result(data []byte) error {
	if len(data) < 4 {
		return nil
	}
	if n := int32(binary.NativeEndian.Uint32(data)); n < 0 {
		return unix.Errno(-n)
	}
	return nil
}

// parse reads one answer, of a socket that is bound.
func parse(b []byte, proto flow.Proto) (s Socket, ok bool) {
	if len(b) < answerLen {
		return s, false
	}
	var a netip.Addr
	switch family := b[0]; family {
	case unix.AF_INET:
		a = netip.AddrFrom4([4]byte(b[addressAt:]))
	case unix.AF_INET6:
		a = netip.AddrFrom16([16]byte(b[addressAt:]))
	default:
		return s, false
	}
	s = Socket{Proto: proto, Local: netip.AddrPortFrom(a, binary.BigEndian.Uint16(b[socketAt:]))}
	s.Cookie = binary.NativeEndian.Uint64(b[cookieAt:])
	s.Only6 = a.Is6() && only6(b[answerLen:])
	return s, s.Local.Port() != 0
}

// only6 looks for the attribute that says that a socket takes no IPv4.
func only6(attrs []byte) bool {
	const head = 4 // length and type of an attribute
	for len(attrs) >= head {
		size, typ := int(binary.NativeEndian.Uint16(attrs)), binary.NativeEndian.Uint16(attrs[2:])
		if size < head || size > len(attrs) {
			return false
		}
		if typ == attrOnly6 {
			return size > head && attrs[head] != 0
		}
		attrs = attrs[min((size+3)&^3, len(attrs)):]
	}
	return false
}
