package test

import (
	"encoding/binary"
	"net"
	"net/netip"
	"testing"

	"github.com/slipway-net/slipway/test/topo"
	"golang.org/x/sys/unix"
)

// Raw packets, as only a hostile guest writes them: straight onto slipway0,
// past the guest's own IP stack and firewall.

// injector writes whole IP packets onto an interface.
type injector struct {
	fd int
	to [2]unix.SockaddrLinklayer // for v4, v6
}

func newInjector(t testing.TB, ns *topo.NS, dev string) *injector {
	t.Helper()
	in := new(injector)
	err := ns.Do(func() error {
		ifi, err := net.InterfaceByName(dev)
		if err != nil {
			return err
		}
		for i, p := range []uint16{unix.ETH_P_IP, unix.ETH_P_IPV6} {
			in.to[i] = unix.SockaddrLinklayer{Protocol: p<<8 | p>>8, Ifindex: ifi.Index}
		}
		in.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(in.fd) })
	return in
}

// send writes one packet; what the kernel itself refuses is no concern of ours.
func (in *injector) send(p []byte) error {
	to := &in.to[0]
	if len(p) > 0 && p[0]>>4 == 6 {
		to = &in.to[1]
	}
	return unix.Sendto(in.fd, p, 0, to)
}

// ip builds a valid IP packet; family by the addresses.
func ip(proto byte, src, dst netip.Addr, payload []byte) []byte {
	if src.Is4() {
		h := make([]byte, 20, 20+len(payload))
		h[0], h[8], h[9] = 0x45, 64, proto
		binary.BigEndian.PutUint16(h[2:], uint16(20+len(payload)))
		copy(h[12:], src.AsSlice())
		copy(h[16:], dst.AsSlice())
		binary.BigEndian.PutUint16(h[10:], checksum(h, 0))
		return append(h, payload...)
	}
	h := make([]byte, 40, 40+len(payload))
	h[0], h[6], h[7] = 0x60, proto, 64
	binary.BigEndian.PutUint16(h[4:], uint16(len(payload)))
	copy(h[8:], src.AsSlice())
	copy(h[24:], dst.AsSlice())
	return append(h, payload...)
}

// checksum is the Internet checksum (RFC 1071).
func checksum(b []byte, sum uint32) uint16 {
	for ; len(b) > 1; b = b[2:] {
		sum += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		sum += uint32(b[0]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// pseudo is the part of the checksum that covers the addresses.
func pseudo(proto byte, src, dst netip.Addr, n int) uint32 {
	sum := uint32(proto) + uint32(n)
	for _, b := range [][]byte{src.AsSlice(), dst.AsSlice()} {
		for i := 0; i < len(b); i += 2 {
			sum += uint32(binary.BigEndian.Uint16(b[i:]))
		}
	}
	return sum
}

// Flags of a TCP header.
const (
	fin = 1 << iota
	syn
	rst
	psh
	ack
)

func tcp(src, dst netip.AddrPort, flags byte, seq uint32) []byte {
	h := make([]byte, 20)
	binary.BigEndian.PutUint16(h, src.Port())
	binary.BigEndian.PutUint16(h[2:], dst.Port())
	binary.BigEndian.PutUint32(h[4:], seq)
	h[12], h[13] = 5<<4, flags
	binary.BigEndian.PutUint16(h[14:], 65535)
	binary.BigEndian.PutUint16(h[16:], checksum(h, pseudo(unix.IPPROTO_TCP, src.Addr(), dst.Addr(), len(h))))
	return ip(unix.IPPROTO_TCP, src.Addr(), dst.Addr(), h)
}

func udp(src, dst netip.AddrPort, payload []byte) []byte {
	h := make([]byte, 8, 8+len(payload))
	binary.BigEndian.PutUint16(h, src.Port())
	binary.BigEndian.PutUint16(h[2:], dst.Port())
	binary.BigEndian.PutUint16(h[4:], uint16(8+len(payload)))
	h = append(h, payload...)
	binary.BigEndian.PutUint16(h[6:], checksum(h, pseudo(unix.IPPROTO_UDP, src.Addr(), dst.Addr(), len(h))))
	return ip(unix.IPPROTO_UDP, src.Addr(), dst.Addr(), h)
}
