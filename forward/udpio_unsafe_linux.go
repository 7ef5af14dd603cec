package forward

import (
	"encoding/binary"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// recvBatchLen is how many messages are received with one system call, and
	// how many single datagrams may go to the guest as one train.
	recvBatchLen = 16

	// recvBufLen holds the longest datagram, with its IP header on a raw socket,
	// and the longest train (UDP_GRO).
	recvBufLen = 64 << 10

	// recvOOBLen holds the control messages we ask for: four of at most 24 bytes, and
	// one of 40.
	recvOOBLen = 160
)

// recvBatch receives several messages at once. Its memory is touched only as far as
// messages are long.
type recvBatch struct {
	msgs  [recvBatchLen]mmsghdr
	iovs  [recvBatchLen]unix.Iovec
	names [recvBatchLen]unix.RawSockaddrInet6 // the longer of the two
	oobs  [recvBatchLen][recvOOBLen]byte
	bufs  [recvBatchLen][]byte
}

// mmsghdr is struct mmsghdr of recvmmsg(2).
type mmsghdr struct {
	hdr unix.Msghdr
	n   uint32
}

func newRecvBatch() *recvBatch {
	b := new(recvBatch)
	room := make([]byte, recvBatchLen*recvBufLen)
	for i := range b.msgs {
		b.bufs[i] = room[i*recvBufLen : (i+1)*recvBufLen : (i+1)*recvBufLen]
		b.iovs[i].Base = &b.bufs[i][0]
		b.iovs[i].SetLen(recvBufLen)
		h := &b.msgs[i].hdr
		h.Iov = &b.iovs[i]
		h.SetIovlen(1)
		h.Name = (*byte)(unsafe.Pointer(&b.names[i]))
		h.Control = &b.oobs[i][0]
	}
	return b
}

// recv receives what fd has, without waiting, and returns the number of messages. One
// less than recvBatchLen means that fd was empty then, or has an error pending.
func (b *recvBatch) recv(fd int) (int, error) {
	for i := range b.msgs {
		h := &b.msgs[i].hdr
		h.Namelen = unix.SizeofSockaddrInet6
		h.SetControllen(recvOOBLen)
	}
	for {
		n, _, errno := unix.Syscall6(unix.SYS_RECVMMSG, uintptr(fd), uintptr(unsafe.Pointer(&b.msgs[0])), recvBatchLen, unix.MSG_DONTWAIT, 0, 0)
		switch errno {
		case 0:
			return int(n), nil
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}

// payload, from and oob return the parts of message i, borrowed until the next recv.
func (b *recvBatch) payload(i int) []byte { return b.bufs[i][:b.msgs[i].n] }

func (b *recvBatch) oob(i int) []byte { return b.oobs[i][:b.msgs[i].hdr.Controllen] }

func (b *recvBatch) from(i int) netip.AddrPort {
	n := &b.names[i]
	port := binary.BigEndian.Uint16((*[2]byte)(unsafe.Pointer(&n.Port))[:])
	switch n.Family {
	case unix.AF_INET:
		return netip.AddrPortFrom(netip.AddrFrom4((*unix.RawSockaddrInet4)(unsafe.Pointer(n)).Addr), port)
	case unix.AF_INET6:
		return netip.AddrPortFrom(zoned(netip.AddrFrom16(n.Addr), n.Scope_id), port)
	}
	return netip.AddrPort{}
}

// putCmsgHeader writes the header of a control message with n bytes of data.
func putCmsgHeader(oob []byte, level, typ int32, n int) {
	h := (*unix.Cmsghdr)(unsafe.Pointer(&oob[0]))
	h.Level, h.Type = level, typ
	h.SetLen(unix.CmsgLen(n))
}
