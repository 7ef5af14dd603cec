package nsagent

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Messages of sock_diag(7), from linux/inet_diag.h. Ports and addresses are in network byte
// order.
//
//	request: family, protocol, extensions, -, states (4), socket
//	answer:  family, state, ...
//	socket:  port (2), peer's port (2), address (16), peer's address (16), device (4), cookie (8)
const (
	sockDiagByFamily = 20
	diagRequestLen   = 56
	diagSocketAt     = 8 // in a request

	// States, from net/tcp_states.h. A UDP socket that is not connected is closed.
	stateClose  = 7
	stateListen = 10
)

// diag asks who waits for clients.
type diag struct {
	asker
	known atomic.Pointer[[]byte] // the protocols that the kernel answers for; nil until it said so
}

// LearnListens finds out of which protocols Listens can tell: the kernel's part for it may be
// a module (tcp_diag, udp_diag), and be missing. A question without it, every one anew, waits
// until the kernel has run modprobe(8), so whoever must not wait may only ask when this has
// returned that it is there.
func (a *Agent) LearnListens(ipprotos ...byte) {
	d := &a.diag
	d.mu.Lock()
	defer d.mu.Unlock()
	var known []byte
	for _, p := range ipprotos {
		if d.answers(p) {
			known = append(known, p)
		}
	}
	d.known.Store(&known)
}

// answers reports whether the kernel can tell of a protocol's sockets. To a question about
// one socket ENOENT may mean that, or that there is no such socket; so this asks for all
// sockets in none of the states. The caller must hold mu.
func (d *diag) answers(ipproto byte) bool {
	if d.ready() != nil {
		return false
	}
	b := make([]byte, diagRequestLen)
	b[0], b[1] = unix.AF_INET, ipproto // one module is for both families
	m, err := d.request(sockDiagByFamily, unix.NLM_F_DUMP, b)
	return err == nil && m.Header.Type == unix.NLMSG_DONE && len(m.Data) >= 4 && binary.NativeEndian.Uint32(m.Data) == 0
}

// Listens reports whether in the guest's namespace somebody waits for clients at the address
// and port at: a TCP socket that listens, or a UDP socket that is bound and not connected. It
// is false where nobody can tell, as before LearnListens, and takes a few microseconds.
func (a *Agent) Listens(ipproto byte, at netip.AddrPort) bool {
	d := &a.diag
	known := d.known.Load()
	if known == nil || !slices.Contains(*known, ipproto) {
		return false
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.ready() != nil {
		return false
	}
	m, err := d.request(sockDiagByFamily, 0, diagRequest(ipproto, at))
	if err != nil || m.Header.Type != sockDiagByFamily || len(m.Data) < 2 {
		return false
	}
	state := m.Data[1]
	return state == stateListen || state == stateClose
}

// diagRequest asks for the one socket that takes a packet from at to at. Not all kernels
// agree which of the two ends of a UDP socket is which.
func diagRequest(ipproto byte, at netip.AddrPort) []byte {
	b := make([]byte, diagRequestLen)
	b[0], b[1] = unix.AF_INET6, ipproto
	if at.Addr().Is4() {
		b[0] = unix.AF_INET
	}
	s := b[diagSocketAt:]
	binary.BigEndian.PutUint16(s, at.Port())
	binary.BigEndian.PutUint16(s[2:], at.Port())
	copy(s[4:20], at.Addr().AsSlice())
	copy(s[20:36], at.Addr().AsSlice())
	copy(s[40:], "\xff\xff\xff\xff\xff\xff\xff\xff") // INET_DIAG_NOCOOKIE
	return b
}
