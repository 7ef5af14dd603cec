package nsagent

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Place is where the guest's routes lead.
type Place uint8

// The places.
const (
	PlaceUnknown  Place = iota // nobody can tell
	PlaceLocal                 // an address of the namespace itself
	PlaceInside                // out of another device than ours: one of the guest's own networks
	PlaceOutside               // out of our device
	PlaceUnrouted              // nowhere
)

const (
	// placesFor is how long an answer holds: a client of a published port asks at
	// its beginning only, and networks come and go.
	placesFor = time.Second
	// placesMost bounds the answers that are remembered.
	placesMost = 4096
	// strangersMost bounds the messages of others that are read before an answer, and
	// answerMost its length: our device's is the longest.
	strangersMost = 64
	answerMost    = 32 << 10
)

// asker puts questions to the guest's kernel.
type asker struct {
	mu     sync.Mutex // guards the fields below, and those of whoever has an asker
	socket *os.File   // netlink(7) of the guest's namespace; nil if there is none, or no more
	fd     int        // of it
	seq    uint32
	answer []byte // buffer; nil until the first question
}

// routes asks where addresses are.
type routes struct {
	asker
	tun   uint32 // index of our device; 0 until the first question
	known map[netip.Addr]placeUntil
}

// placeUntil is an answer.
type placeUntil struct {
	place Place
	until time.Time
}

// Where tells where a is, as the guest's kernel routes it without marks. Answers are up
// to a second old. It takes a few microseconds.
func (a *Agent) Where(addr netip.Addr) (Place, error) {
	addr = addr.WithZone("").Unmap()
	r := &a.routes
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	if k, ok := r.known[addr]; ok && now.Before(k.until) {
		return k.place, nil
	}
	if err := r.open(a); err != nil {
		return PlaceUnknown, err
	}
	p, err := r.ask(addr)
	if err != nil {
		return PlaceUnknown, fmt.Errorf("look up the guest's route to %v: %w", addr, err)
	}
	if r.known == nil || len(r.known) >= placesMost {
		r.known = make(map[netip.Addr]placeUntil)
	}
	r.known[addr] = placeUntil{p, now.Add(placesFor)}
	return p, nil
}

// ready prepares the socket the first time.
func (k *asker) ready() (err error) {
	if k.socket == nil {
		return ErrClosed
	}
	if k.answer != nil {
		return nil
	}
	if k.fd, err = rawFD(k.socket); err == nil {
		k.answer = make([]byte, answerMost)
	}
	return err
}

// open looks for our device the first time.
func (r *routes) open(a *Agent) error {
	err := r.ready()
	if err != nil || r.tun != 0 {
		return err
	}
	if r.tun, err = r.index(a.spec.TUN.Name); err != nil {
		return fmt.Errorf("look up the guest's device %s: %w", a.spec.TUN.Name, err)
	}
	return nil
}

// index returns the number of a device.
func (r *routes) index(name string) (uint32, error) {
	m, err := r.request(unix.RTM_GETLINK, 0, append(make([]byte, unix.SizeofIfInfomsg), attribute(unix.IFLA_IFNAME, append([]byte(name), 0))...))
	if err != nil {
		return 0, err
	}
	if m.Header.Type != unix.RTM_NEWLINK || len(m.Data) < unix.SizeofIfInfomsg {
		return 0, unix.EBADMSG
	}
	return binary.NativeEndian.Uint32(m.Data[4:]), nil // ifi_index
}

// ask puts one question.
func (r *routes) ask(a netip.Addr) (Place, error) {
	ip := a.AsSlice()
	msg := make([]byte, unix.SizeofRtMsg)
	msg[0], msg[1] = unix.AF_INET6, byte(a.BitLen()) // rtm_family, rtm_dst_len
	if a.Is4() {
		msg[0] = unix.AF_INET
	}
	m, err := r.request(unix.RTM_GETROUTE, 0, append(msg, attribute(unix.RTA_DST, ip)...))
	switch {
	case errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.EACCES), errors.Is(err, unix.EINVAL):
		return PlaceUnrouted, nil // no route, unreachable, prohibit, blackhole
	case err != nil:
		return PlaceUnknown, err
	case m.Header.Type != unix.RTM_NEWROUTE || len(m.Data) < unix.SizeofRtMsg:
		return PlaceUnknown, unix.EBADMSG
	}
	return r.place(&m)
}

// place reads an answer.
func (r *routes) place(m *syscall.NetlinkMessage) (Place, error) {
	switch m.Data[7] { // rtm_type
	case unix.RTN_LOCAL:
		return PlaceLocal, nil
	case unix.RTN_UNICAST:
	default:
		return PlaceUnrouted, nil
	}
	attrs, err := syscall.ParseNetlinkRouteAttr(m)
	if err != nil {
		return PlaceUnknown, err
	}
	for _, at := range attrs {
		if at.Attr.Type == unix.RTA_OIF && len(at.Value) == 4 {
			if binary.NativeEndian.Uint32(at.Value) == r.tun {
				return PlaceOutside, nil
			}
			return PlaceInside, nil
		}
	}
	return PlaceUnknown, unix.EBADMSG
}

// errStrangers is the end of a question among messages of others.
var errStrangers = errors.New("others send to the socket")

// request sends one message and returns its first answer, which is valid until the next one.
// It does not wait to receive: the kernel has answered when sendto(2) returns. Whoever has
// CAP_NET_ADMIN in the namespace may send to our port, too.
func (k *asker) request(typ, flags uint16, body []byte) (syscall.NetlinkMessage, error) {
	k.seq++
	b := binary.NativeEndian.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+len(body)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = binary.NativeEndian.AppendUint16(b, unix.NLM_F_REQUEST|flags)
	b = binary.NativeEndian.AppendUint32(b, k.seq)
	b = append(binary.NativeEndian.AppendUint32(b, 0), body...)
	if err := unix.Sendto(k.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return syscall.NetlinkMessage{}, err
	}
	for range strangersMost {
		n, from, err := unix.Recvfrom(k.fd, k.answer, unix.MSG_DONTWAIT)
		if err != nil {
			return syscall.NetlinkMessage{}, err
		}
		if a, ok := from.(*unix.SockaddrNetlink); !ok || a.Pid != 0 {
			continue // not the kernel
		}
		list, err := syscall.ParseNetlinkMessage(k.answer[:n])
		if err != nil {
			return syscall.NetlinkMessage{}, err
		}
		for _, m := range list {
			switch {
			case m.Header.Seq != k.seq: // of a question that was given up
			case m.Header.Type == unix.NLMSG_ERROR && len(m.Data) >= 4:
				return m, unix.Errno(-int32(binary.NativeEndian.Uint32(m.Data)))
			default:
				return m, nil
			}
		}
	}
	return syscall.NetlinkMessage{}, errStrangers
}

// attribute is one of rtnetlink(7).
func attribute(typ uint16, value []byte) []byte {
	b := binary.NativeEndian.AppendUint16(nil, uint16(unix.SizeofRtAttr+len(value)))
	b = append(binary.NativeEndian.AppendUint16(b, typ), value...)
	return append(b, make([]byte, -len(b)&(unix.RTA_ALIGNTO-1))...)
}

func (k *asker) close() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.socket != nil {
		k.socket.Close()
		k.socket = nil
	}
}
