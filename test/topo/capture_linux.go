package topo

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Capture keeps the last packets of one interface in memory, so that a failed
// test can show them. It stands in the way of nothing: what it does not read in
// time is lost to it alone.
type Capture struct {
	file *os.File
	done chan struct{}

	mu   sync.Mutex
	ring [captureLen]captured // guarded by mu
	next int                  // guarded by mu
}

type captured struct {
	at   time.Time
	size int
	head []byte
}

const (
	captureLen  = 4096 // packets kept
	captureSnap = 160  // bytes of each
)

// StartCapture begins to capture on the interface dev of n.
func StartCapture(n *NS, dev string) (*Capture, error) {
	c := &Capture{done: make(chan struct{})}
	err := n.Do(func() error {
		ifi, err := net.InterfaceByName(dev)
		if err != nil {
			return err
		}
		all := int(binary.NativeEndian.Uint16([]byte{0, unix.ETH_P_ALL}))
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, all)
		if err != nil {
			return err
		}
		c.file = os.NewFile(uintptr(fd), "capture")
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: uint16(all), Ifindex: ifi.Index})
	})
	if err != nil {
		if c.file != nil {
			c.file.Close()
		}
		return nil, err
	}
	go c.run()
	return c, nil
}

func (c *Capture) run() {
	defer close(c.done)
	raw, err := c.file.SyscallConn()
	if err != nil {
		return
	}
	buf := make([]byte, captureSnap)
	for {
		var n int
		var rerr error
		err := raw.Read(func(fd uintptr) bool {
			n, _, rerr = unix.Recvfrom(int(fd), buf, unix.MSG_TRUNC)
			return !errors.Is(rerr, unix.EAGAIN)
		})
		if err != nil {
			return
		}
		if rerr != nil { // the interface went down
			if errors.Is(rerr, unix.ENETDOWN) {
				continue
			}
			return
		}
		c.mu.Lock()
		e := &c.ring[c.next%captureLen]
		e.at, e.size = time.Now(), n
		e.head = append(e.head[:0], buf[:min(n, len(buf))]...)
		c.next++
		c.mu.Unlock()
	}
}

// PCAP returns what was captured as a pcap file of raw IP packets.
func (c *Capture) PCAP() []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	const linkTypeRaw = 101
	var b bytes.Buffer
	b.Write(binary.LittleEndian.AppendUint32(nil, 0xa1b2c3d4))
	b.Write([]byte{2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	b.Write(binary.LittleEndian.AppendUint32(nil, captureSnap))
	b.Write(binary.LittleEndian.AppendUint32(nil, linkTypeRaw))
	for i := max(0, c.next-captureLen); i < c.next; i++ {
		e := c.ring[i%captureLen]
		for _, v := range []int{int(e.at.Unix()), e.at.Nanosecond() / 1000, len(e.head), e.size} {
			b.Write(binary.LittleEndian.AppendUint32(nil, uint32(v)))
		}
		b.Write(e.head)
	}
	return b.Bytes()
}

// Close ends the capture and waits for its goroutine.
func (c *Capture) Close() {
	if c != nil {
		c.file.Close()
		<-c.done
	}
}
