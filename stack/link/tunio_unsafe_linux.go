package link

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// vnetHdrLen is the size in bytes of struct virtio_net_hdr without num_buffers.
const vnetHdrLen = int(unsafe.Sizeof(Header{}))

// maxParts bounds the parts of one packet: a 64 KiB packet of gVisor's has at most
// a header and the pieces of its payload, each at least an MSS except at the edges.
const maxParts = 64

// readOp is the state of the one read in progress; fn is made once, so that a read
// allocates nothing.
type readOp struct {
	hdr   Header
	iov   [3]unix.Iovec
	n     int
	errno syscall.Errno
	fn    func(fd uintptr) bool
	tried bool             // result of once
	once  func(fd uintptr) // one try, for TryReadPacket
}

func (r *readOp) prepare(head, rest []byte) {
	r.iov[0] = iovec(unsafe.Slice((*byte)(unsafe.Pointer(&r.hdr)), vnetHdrLen))
	r.iov[1] = iovec(head)
	r.iov[2] = iovec(rest)
}

func (r *readOp) try(fd uintptr) bool {
	for {
		n, _, errno := unix.RawSyscall(unix.SYS_READV, fd, uintptr(unsafe.Pointer(&r.iov[0])), uintptr(len(r.iov)))
		switch errno {
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			return false
		}
		r.n, r.errno = int(n), errno
		return true
	}
}

// writeOp is the state of one write.
type writeOp struct {
	hdr   Header
	iov   [1 + maxParts]unix.Iovec
	n     int
	errno syscall.Errno
	fn    func(fd uintptr) bool
}

func (w *writeOp) prepare(h Header, parts [][]byte) {
	w.hdr = h
	w.iov[0] = iovec(unsafe.Slice((*byte)(unsafe.Pointer(&w.hdr)), vnetHdrLen))
	w.n = 1
	if len(parts) > maxParts {
		parts = [][]byte{flatten(parts)}
	}
	for _, p := range parts {
		if len(p) > 0 {
			w.iov[w.n] = iovec(p)
			w.n++
		}
	}
}

func (w *writeOp) try(fd uintptr) bool {
	for {
		_, _, errno := unix.Syscall(unix.SYS_WRITEV, fd, uintptr(unsafe.Pointer(&w.iov[0])), uintptr(w.n))
		switch errno {
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			return false
		}
		w.errno = errno
		return true
	}
}

// release forgets the caller's memory.
func (w *writeOp) release() {
	clear(w.iov[1:w.n])
}

func iovec(b []byte) unix.Iovec {
	v := unix.Iovec{Base: unsafe.SliceData(b)}
	v.SetLen(len(b))
	return v
}

func flatten(parts [][]byte) []byte {
	var all []byte
	for _, p := range parts {
		all = append(all, p...)
	}
	return all
}
