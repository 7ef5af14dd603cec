package forward

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/slipway-net/slipway/internal/flow"
)

// Theory of operation.
//
// A raw ICMP socket gets a copy of every ICMP message that arrives. One socket of each
// family serves all pings; their identifiers are taken from a block of 2048, chosen at
// random when the socket is made, so that two daemons on a host rarely meet. The kernel
// drops for us what is not an echo reply (ICMP_FILTER) and what is not of our block (a
// socket filter); errors about other programs' messages come through and are ignored.
//
// IPv4 messages arrive with their IP header and unchecked, so their checksum is
// checked here; ICMPv6 ones come without a header and are checked by the kernel.

const (
	rawIDs    = 2048 // pings at a time on a socket; more than pingMax
	rawIDMask = 0xffff &^ (rawIDs - 1)
)

// rawPings are the pings of one family.
type rawPings struct {
	v6   bool
	poll *poller

	mu   sync.Mutex // guards the fields below; held while sending
	out  *icmpSender
	base uint16
	next int
	ids  [rawIDs]*ping
}

// rawPing is one ping's share of a rawPings.
type rawPing struct {
	all *rawPings
	id  uint16
}

// open gives p an identifier, and makes the socket for the first.
func (r *rawPings) open(p *ping) (pingSocket, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.out == nil {
		if err := r.openSocketLocked(); err != nil {
			return nil, fmt.Errorf("%w: %w", errNoSocket, err)
		}
	}
	for range rawIDs {
		i := r.next
		r.next = (r.next + 1) % rawIDs
		if r.ids[i] == nil {
			r.ids[i] = p
			return &rawPing{all: r, id: r.base | uint16(i)}, nil
		}
	}
	return nil, fmt.Errorf("%w: every identifier is in use", errNoSocket)
}

func (r *rawPings) openSocketLocked() error {
	s := &icmpSender{header: headerOptions{v6: r.v6}}
	if err := s.open(unix.SOCK_RAW); err != nil {
		return err
	}
	// Never block 0: Linux replies to a request of zeroes with a checksum of zero,
	// which is wrong (the sum of what is sent must be 0xffff).
	r.base = uint16(1+rand.IntN(0x10000/rawIDs-1)) * rawIDs
	err := filterReplies(s.fd.fd, r.v6, r.base)
	if err == nil {
		err = r.poll.add(s.fd.fd, r)
	}
	if err != nil {
		s.fd.close()
		return err
	}
	r.out = s
	return nil
}

// icmpFilter is ICMP_FILTER of linux/icmp.h; a set bit is a type that is dropped.
const icmpFilter = 1

// filterReplies has the kernel drop all but echo replies with an identifier of the
// block base.
func filterReplies(fd int, v6 bool, base uint16) error {
	var err error
	var load []unix.SockFilter
	if v6 {
		var f unix.ICMPv6Filter
		for i := range f.Data {
			f.Data[i] = ^uint32(0)
		}
		f.Data[echoReply6/32] &^= 1 << (echoReply6 % 32)
		err = unix.SetsockoptICMPv6Filter(fd, unix.SOL_ICMPV6, unix.ICMPV6_FILTER, &f)
		load = []unix.SockFilter{{Code: unix.BPF_LD | unix.BPF_H | unix.BPF_ABS, K: 4}}
	} else {
		err = unix.SetsockoptInt(fd, unix.SOL_RAW, icmpFilter, ^(1 << echoReply4))
		load = []unix.SockFilter{ // the identifier, behind the IP header
			{Code: unix.BPF_LDX | unix.BPF_B | unix.BPF_MSH},
			{Code: unix.BPF_LD | unix.BPF_H | unix.BPF_IND, K: 4},
		}
	}
	if err != nil {
		return fmt.Errorf("set icmp filter: %w", err)
	}
	prog := append(load,
		unix.SockFilter{Code: unix.BPF_ALU | unix.BPF_AND | unix.BPF_K, K: rawIDMask},
		unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 1, K: uint32(base)},
		unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: 1 << 18}, // all of it
		unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K},
	)
	err = unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]})
	if err != nil {
		return fmt.Errorf("attach socket filter: %w", err)
	}
	return nil
}

// send implements pingSocket.
func (s *rawPing) send(e flow.Echo, to netip.Addr) error {
	s.all.mu.Lock()
	defer s.all.mu.Unlock()
	return s.all.out.send(&e, s.id, to)
}

// close gives the identifier back; the socket stays for other pings.
func (s *rawPing) close() {
	s.all.mu.Lock()
	defer s.all.mu.Unlock()
	s.all.ids[s.id&^rawIDMask] = nil
}

// closeSocket closes the socket; the poller has ended.
func (r *rawPings) closeSocket() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.out != nil {
		r.out.fd.close()
	}
}

// ready implements pollable.
func (r *rawPings) ready(events uint32, rx *recvBatch) {
	r.mu.Lock()
	out := r.out
	r.mu.Unlock()
	if out != nil {
		receiveICMP(out, r.poll, events, rx, r.reply, r.failed)
	}
}

// find returns the ping with an identifier of ours.
func (r *rawPings) find(id uint16) *ping {
	r.mu.Lock()
	defer r.mu.Unlock()
	if id&rawIDMask != r.base {
		return nil
	}
	return r.ids[id&^rawIDMask]
}

func (r *rawPings) reply(from netip.Addr, b []byte, a ancillary) {
	if !r.v6 {
		var err error
		if b, err = icmpOfIPv4(b); err != nil {
			return
		}
	}
	m, ok := parseEcho(b)
	if !ok || !m.isReply(r.v6) {
		return
	}
	if p := r.find(m.id); p != nil {
		p.fromHost(from, m.seq, m.payload, a.hops, a.tos)
	}
}

// failed gets every ICMP error about an ICMP message of the host's, whoever sent it.
func (r *rawPings) failed(e sentError) {
	m, ok := parseEcho(e.quote)
	if !ok || !m.isRequest(r.v6) {
		return
	}
	if p := r.find(m.id); p != nil && p.dial == e.to.Addr() {
		p.hostError(flow.ICMP{Type: e.typ, Code: e.code}, e.from, e.mtu, m.seq, m.payload)
	}
}

// errBadICMP reports an IPv4 packet without a valid ICMP message.
var errBadICMP = errors.New("not a valid ICMP message")

// icmpOfIPv4 returns the ICMP message in an IPv4 packet as a raw socket delivers it,
// that is reassembled and with a checked IP header.
func icmpOfIPv4(b []byte) ([]byte, error) {
	const minHeader = 20
	if len(b) < minHeader {
		return nil, errBadICMP
	}
	n := int(b[0]&0xf) * 4
	if b[0]>>4 != 4 || n < minHeader || len(b) < n+icmpHeaderLen || sumOnes(b[n:]) != 0xffff {
		return nil, errBadICMP
	}
	return b[n:], nil
}
