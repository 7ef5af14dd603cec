package link

import (
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// Theory of operation.
//
// A TUN device is a network interface whose wire is a file: what the guest's
// kernel sends comes out of read(2), one packet a call, and what we write(2) the
// guest's kernel receives, in softirq, before write returns. With IFF_VNET_HDR
// each packet is preceded by a struct virtio_net_hdr, and after TUNSETOFFLOAD the
// kernel leaves segmentation and checksums to us: a bulk transfer then crosses in
// packets of 64 KiB, whatever the MTU. Towards the guest no permission is needed:
// the kernel takes any offload header it can parse.
//
// Waiting is left to Go's netpoller: a goroutine parked there costs nothing, and a
// blocking poll(2) was measured to give a third of the connections per second.
// RawConn keeps the descriptor alive during a call, so that Close cannot hand its
// number to somebody else half way.
//
// The kernel drops what the guest sends when the device's queue (txqueuelen) is
// full; the agent sets it long enough for the largest windows. Our writes are not
// queued by the kernel: they run the guest's receive path to its end.

// TUN is the Link over a Linux TUN device.
type TUN struct {
	file *os.File
	raw  syscall.RawConn
	mtu  int
	off  Offloads

	read   readOp // used by the one reader
	writes sync.Pool
}

// NewTUN takes over f, a non-blocking TUN descriptor opened with IFF_TUN,
// IFF_NO_PI and IFF_VNET_HDR, and agrees with the kernel on offloads: those that
// it refuses are given up one by one. mtu is the device's, in bytes. On error f
// stays the caller's.
//
// If Go's poller does not know f, the caller waits for the device, with Watch and
// TryReadPacket, and ReadPacket must not be called.
func NewTUN(f *os.File, mtu int) (*TUN, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("open link on %s: %w", f.Name(), err)
	}
	t := &TUN{file: f, raw: raw, mtu: mtu}
	t.read.fn = t.read.try
	t.read.once = func(fd uintptr) { t.read.tried = t.read.try(fd) }
	t.writes.New = func() any {
		w := new(writeOp)
		w.fn = w.try
		return w
	}
	var ctlErr error
	if err := raw.Control(func(fd uintptr) { t.off, ctlErr = setOffloads(int(fd)) }); err != nil {
		return nil, fmt.Errorf("open link on %s: %w", f.Name(), err)
	}
	if ctlErr != nil {
		return nil, fmt.Errorf("set offloads on %s: %w", f.Name(), ctlErr)
	}
	return t, nil
}

// Watch calls f with the descriptor to wait for, which is valid until f returns, and
// after that until Close.
func (t *TUN) Watch(f func(fd int)) error {
	return t.raw.Control(func(fd uintptr) { f(int(fd)) })
}

// offloads in the order in which they are given up last to first: each needs the
// ones before it. The kernel takes USO4 and USO6 (Linux 6.2) only together.
var offloads = []struct {
	name string
	bits int
}{
	{"csum", unix.TUN_F_CSUM},
	{"tso4", unix.TUN_F_TSO4},
	{"tso6", unix.TUN_F_TSO6},
	{"ecn", unix.TUN_F_TSO_ECN},
	{"uso", unix.TUN_F_USO4 | unix.TUN_F_USO6},
}

// setOffloads asks for every offload that the kernel grants.
func setOffloads(fd int) (Offloads, error) {
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, vnetHdrLen); err != nil {
		return Offloads{}, fmt.Errorf("header of %d bytes: %w", vnetHdrLen, err)
	}
	var o Offloads
	granted := 0
	for _, f := range offloads {
		if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, granted|f.bits); err != nil {
			o.Refused = append(o.Refused, f.name)
			continue
		}
		granted |= f.bits
		o.Accepted = append(o.Accepted, f.name)
	}
	// The last ioctl may have been refused: say again what holds.
	if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, granted); err != nil {
		return Offloads{}, err
	}
	o.TSO = granted&unix.TUN_F_TSO4 != 0 && granted&unix.TUN_F_TSO6 != 0
	o.USO = granted&unix.TUN_F_USO4 != 0
	return o, nil
}

// MTU implements Link.
func (t *TUN) MTU() int { return t.mtu }

// Offloads implements Link.
func (t *TUN) Offloads() Offloads { return t.off }

// Close implements Link. The device goes with its last descriptor.
func (t *TUN) Close() error { return t.file.Close() }

// ReadPacket implements Link.
func (t *TUN) ReadPacket(head, rest []byte) (int, Header, error) {
	r := &t.read
	r.prepare(head, rest)
	return r.result(t, t.raw.Read(r.fn))
}

// result is what a read ended with.
func (r *readOp) result(t *TUN, err error) (int, Header, error) {
	if err != nil {
		return 0, Header{}, closed(err)
	}
	if r.errno != 0 {
		return 0, Header{}, fmt.Errorf("read from %s: %w", t.file.Name(), r.errno)
	}
	if r.n < vnetHdrLen {
		return 0, Header{}, fmt.Errorf("read from %s: %d bytes, shorter than a header", t.file.Name(), r.n)
	}
	return r.n - vnetHdrLen, r.hdr, nil
}

// TryReadPacket implements TryReader.
func (t *TUN) TryReadPacket(head, rest []byte) (int, Header, error) {
	r := &t.read
	r.prepare(head, rest)
	err := t.raw.Control(r.once)
	if err == nil && !r.tried {
		return 0, Header{}, ErrAgain
	}
	return r.result(t, err)
}

// WritePacket implements Link.
func (t *TUN) WritePacket(h Header, parts [][]byte) error {
	w := t.writes.Get().(*writeOp)
	w.prepare(h, parts)
	err := t.raw.Write(w.fn)
	errno := w.errno
	w.release()
	t.writes.Put(w)
	if err != nil {
		return closed(err)
	}
	if errno != 0 {
		return fmt.Errorf("write to %s: %w", t.file.Name(), errno)
	}
	return nil
}

// closed maps the ways in which package os says "closed" to net.ErrClosed.
func closed(err error) error {
	if errors.Is(err, os.ErrClosed) {
		return net.ErrClosed
	}
	return err
}
