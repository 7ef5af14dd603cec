package nsagent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Sockets of the guest's namespace, for what begins on the host. The agent opens them and
// passes them out by the dozen: a question takes it about 100 us, which is as much as the
// rest of a short connection. Those that wait to be used have no address and no port,
// and nobody in the guest sees them.

// SocketKind is a kind of socket.
type SocketKind uint8

// The kinds. A transparent one may be bound to the gateway's address, or a client's,
// for which the rules of the kernel path keep the answers inside.
const (
	SocketTCP4 SocketKind = iota
	SocketTCP6
	SocketTransparent4
	SocketTransparent6
	SocketUDP4
	SocketUDP6
	SocketDiag // sock_diag(7), which blocks
	socketKinds
)

// String returns a name for people.
func (k SocketKind) String() string {
	names := [...]string{"TCP", "TCP for IPv6", "transparent TCP", "transparent TCP for IPv6", "UDP", "UDP for IPv6", "sock_diag"}
	if k >= socketKinds {
		return fmt.Sprintf("socket kind %d", uint8(k))
	}
	return names[k]
}

// transparent reports whether it is one of the kernel path's.
func (k SocketKind) transparent() bool { return k == SocketTransparent4 || k == SocketTransparent6 }

// The ports of connections from the gateway's address, on which nothing but the kernel
// path's listener is: there can be twice as many to one port as with the guest's own range. The
// kernel takes no rule whose ports end with 65535 (net/core/fib_rules.c).
const firstGatewayPort, lastGatewayPort = 1024, 65534

// openSocket opens one in the namespace of the calling thread.
func openSocket(k SocketKind) (int, error) {
	const flags = unix.SOCK_NONBLOCK | unix.SOCK_CLOEXEC
	switch k {
	case SocketTCP4, SocketTransparent4:
		return openTCP(unix.AF_INET, k.transparent())
	case SocketTCP6, SocketTransparent6:
		return openTCP(unix.AF_INET6, k.transparent())
	case SocketUDP4:
		return unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|flags, 0)
	case SocketUDP6:
		return unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|flags, 0)
	case SocketDiag:
		return unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_INET_DIAG)
	}
	return -1, fmt.Errorf("%v: %w", k, unix.EINVAL)
}

func openTCP(family int, transparent bool) (int, error) {
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return -1, err
	}
	if err = guestOptions(fd); err == nil && transparent {
		if err = makeTransparent(fd, family); err == nil {
			err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, gatewayMark)
		}
		// Its port is chosen by connect(2), which knows the peer. The range is Linux 6.3.
		unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)
		unix.SetsockoptInt(fd, unix.SOL_IP, ipLocalPortRange, lastGatewayPort<<16|firstGatewayPort)
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// ipLocalPortRange is IP_LOCAL_PORT_RANGE of linux/in.h.
const ipLocalPortRange = 51

// makeTransparent allows addresses that the namespace has not.
func makeTransparent(fd, family int) error {
	if family == unix.AF_INET6 {
		return unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1)
	}
	return unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_TRANSPARENT, 1)
}

// guestOptions sets the options of every TCP connection with the guest.
func guestOptions(fd int) (err error) {
	for _, o := range [][3]int{
		{unix.SOL_TCP, unix.TCP_NODELAY, 1},
		{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		{unix.SOL_SOCKET, unix.SO_OOBINLINE, 1}, // urgent data is data
		{unix.SOL_TCP, unix.TCP_KEEPIDLE, keepIdle},
		{unix.SOL_TCP, unix.TCP_KEEPINTVL, keepInterval},
		{unix.SOL_TCP, unix.TCP_KEEPCNT, keepCount},
		{unix.SOL_TCP, unix.TCP_SYNCNT, synRetries},
	} {
		if err == nil {
			err = unix.SetsockoptInt(fd, o[0], o[1], o[2])
		}
	}
	// A guest whose host has another default (bbr paces, for one) gains nothing by it
	// on a path without a bottleneck. Not every kernel lets a namespace choose.
	unix.SetsockoptString(fd, unix.SOL_TCP, unix.TCP_CONGESTION, congestion)
	return err
}

// sockets answers a request for some.
func (g *guest) sockets(id uint64, req *socketsRequest) {
	var files []*os.File
	defer func() { closeAll(files) }()
	for range min(req.N, maxFiles) {
		fd, err := openSocket(req.Kind)
		if err != nil && len(files) == 0 {
			g.wire.send(event{ID: id, Failed: wireErrorOf(&Error{Op: "open", On: req.Kind.String() + " socket", Err: err})})
			return
		}
		if err != nil {
			break // some are better than none
		}
		files = append(files, os.NewFile(uintptr(fd), "socket"))
	}
	g.wire.send(event{ID: id, Sockets: len(files)}, files...)
}

// socketsAnswer is what comes of a request.
type socketsAnswer struct {
	fds []int
	err error
}

// Sockets returns up to n new sockets of the guest's namespace, at least one, which are
// the caller's.
func (a *Agent) Sockets(ctx context.Context, k SocketKind, n int) ([]int, error) {
	answer := make(chan socketsAnswer, 1)
	a.mu.Lock()
	if a.over {
		a.mu.Unlock()
		return nil, ErrClosed
	}
	a.nextID++
	id := a.nextID
	a.asked[id] = answer
	a.mu.Unlock()
	err := a.send(request{ID: id, Sockets: &socketsRequest{Kind: k, N: max(1, min(n, maxFiles))}})
	if err == nil {
		select {
		case got := <-answer:
			return got.fds, got.err
		case <-ctx.Done():
			err = context.Cause(ctx)
		}
	}
	a.mu.Lock()
	_, waiting := a.asked[id]
	delete(a.asked, id)
	a.mu.Unlock()
	if !waiting { // the answer came all the same
		closeFDs((<-answer).fds)
	}
	return nil, fmt.Errorf("ask the agent for a %v socket: %w", k, err)
}

// answered takes the answer to a request for sockets, and reports whether there was one.
// The descriptors are then not the caller's any more.
func (a *Agent) answered(ev *event, fds []int) bool {
	a.mu.Lock()
	answer := a.asked[ev.ID]
	delete(a.asked, ev.ID)
	a.mu.Unlock()
	switch {
	case answer == nil:
		return false
	case ev.Failed != nil:
		answer <- socketsAnswer{err: ev.Failed.err()}
		return false
	case len(fds) == 0:
		answer <- socketsAnswer{err: ErrClosed} // it is about to
		return false
	}
	answer <- socketsAnswer{fds: fds}
	return true
}

func closeFDs(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

const (
	// poolBatch is how many sockets are asked for at a time, and poolLow how many are
	// left when that is done. Nobody asks before the first one is wanted.
	poolBatch = 48
	poolLow   = 16
	// poolPatience bounds how long the agent may take.
	poolPatience = 5 * time.Second
)

// ErrNoneReady is returned by Socket when it would have to wait.
var ErrNoneReady = errors.New("no socket of the guest is at hand")

// pool are sockets of one kind that nobody uses yet.
type pool struct {
	mu      sync.Mutex // guards the fields below
	idle    []int
	waiters []chan<- socketsAnswer
	filling bool
	closed  bool
}

// HasSockets reports whether there can be sockets of kind k: transparent ones are the
// kernel path's.
func (a *Agent) HasSockets(k SocketKind) bool {
	switch k {
	case SocketTransparent4:
		return a.kernel != nil && a.kernel.Listener4 != nil
	case SocketTransparent6:
		return a.kernel != nil && a.kernel.Listener6 != nil
	}
	return k < socketKinds
}

// Socket returns a socket of the guest's namespace, which is the caller's. Without wait it
// returns at once, with ErrNoneReady when none is at hand; the agent is asked for
// more then.
func (a *Agent) Socket(k SocketKind, wait bool) (int, error) {
	if !a.HasSockets(k) {
		return -1, fmt.Errorf("open a %v socket in the guest: %w", k, errors.ErrUnsupported)
	}
	p := &a.pools[k]
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return -1, ErrClosed
	}
	n := len(p.idle)
	if n > 0 {
		fd := p.idle[n-1]
		p.idle = p.idle[:n-1]
		if n <= poolLow {
			a.fill(k)
		}
		p.mu.Unlock()
		return fd, nil
	}
	var answer chan socketsAnswer
	if wait {
		answer = make(chan socketsAnswer, 1)
		p.waiters = append(p.waiters, answer)
	}
	a.fill(k)
	p.mu.Unlock()
	if !wait {
		return -1, ErrNoneReady
	}
	got := <-answer
	if got.err != nil {
		return -1, got.err
	}
	return got.fds[0], nil
}

// fill asks for more sockets of kind k, unless that is being done. The caller holds the
// pool's lock.
func (a *Agent) fill(k SocketKind) {
	p := &a.pools[k]
	if p.filling {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.over {
		p.give(nil, ErrClosed)
		return
	}
	p.filling = true
	a.workers.Go(func() {
		ctx, cancel := context.WithTimeout(context.Background(), poolPatience) // or the agent's end
		defer cancel()
		for more := true; more; {
			fds, err := a.Sockets(ctx, k, poolBatch)
			p.mu.Lock()
			p.give(fds, err)
			more = len(p.waiters) > 0
			p.filling = more
			p.mu.Unlock()
		}
	})
}

// give hands out new sockets, or tells all why there is none. The caller holds the lock.
func (p *pool) give(fds []int, err error) {
	if err == nil && p.closed {
		closeFDs(fds)
		err = ErrClosed
	}
	if err != nil {
		for _, w := range p.waiters {
			w <- socketsAnswer{err: err}
		}
		p.waiters = nil
		return
	}
	for len(p.waiters) > 0 && len(fds) > 0 {
		p.waiters[0] <- socketsAnswer{fds: fds[:1:1]}
		p.waiters, fds = p.waiters[1:], fds[1:]
	}
	p.idle = append(p.idle, fds...)
}

// close ends the pool, when the agent answers no more.
func (p *pool) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	closeFDs(p.idle)
	p.idle = nil
	p.give(nil, ErrClosed)
}
