package dockerproxy

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/slipway-net/slipway/forward/publish"
	"github.com/slipway-net/slipway/internal/api"
	"github.com/slipway-net/slipway/internal/flow"
)

// Theory of operation.
//
// dockerd starts one of us for each published port, in its own namespaces. It wants to
// know on descriptor 3 whether the port works: "0\n", or "1\n" and a text that its user
// gets to read; it waits 16 s for that and tries an explicit port once only. With
// -use-listen-fd descriptor 4 is a socket that dockerd has bound, in TCP's case also
// listens on; without, as before Docker 28, we bind it. An interrupt ends us, and so does
// TERM, which the kernel sends when dockerd's own process is killed.
//
// There are two places to serve. On the host the daemon of the engine listens and carries
// clients to the container: all we do for it is ask on guest.sock, and hold that connection
// open, which is a lease. If the daemon goes we serve on inside, and ask again once it is
// back. In the engine's namespace the listener is ours, for clients there whom dockerd's
// rules do not lead to the container: those of 127.0.0.1 and ::1 foremost.
//
// An address that is the namespace's own and no loopback, such as that of a bridge, has
// nothing to do with the host: a port there is not published. An address that is the host's
// cannot be bound inside unless net.ipv4.ip_nonlocal_bind and its IPv6 twin allow it. Where
// they do not there is no listener inside, and no need for one: nobody inside can ask that
// address.

// The descriptors that dockerd passes.
const (
	statusFD = 3
	listenFD = 4
)

// startLimit is how long we try before dockerd gives up, after 16 s, and forgets us.
const startLimit = 12 * time.Second

// reachLimit is how much of that a daemon that does not answer may take: as long as a
// slipway attach needs to be started again.
const reachLimit = 5 * time.Second

// Main is a proxy's whole life; it returns the exit status. args are with the program's
// name.
func Main(args []string, version string) int {
	status := openStatus()
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	o, err := parse(args[1:], os.Stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		return status.failed(err)
	case o.version:
		fmt.Printf("%s version %s\n", Name, version)
		return 0
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	p, err := start(ctx, o, os.Getenv(EnvSocket), log)
	if err != nil {
		return status.failed(err)
	}
	if err := status.serving(); err != nil { // dockerd has given up, or is gone
		log.Error("cannot tell dockerd", slog.Any("err", err))
		stop()
	}
	p.run(ctx)
	return 0
}

// statusPipe is the writing end of dockerd's pipe; nil when somebody else started us.
type statusPipe struct{ *os.File }

// openStatus takes descriptor 3 if it is a pipe. Otherwise it may be anything, the Go
// runtime's own included.
func openStatus() statusPipe {
	var st unix.Stat_t
	if unix.Fstat(statusFD, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFIFO {
		return statusPipe{}
	}
	unix.CloseOnExec(statusFD)
	return statusPipe{os.NewFile(statusFD, "status")}
}

// serving says that the port works.
func (s statusPipe) serving() error {
	if s.File == nil {
		return nil
	}
	defer s.Close()
	_, err := s.WriteString("0\n")
	return err
}

// failed says why the port does not work and returns the exit status. What dockerd prints
// is one line.
func (s statusPipe) failed(err error) int {
	text := strings.ReplaceAll(err.Error(), "\n", "; ")
	if refused := (*api.Error)(nil); errors.As(err, &refused) && refused.Hint != "" {
		text += " (hint: " + refused.Hint + ")"
	}
	fmt.Fprintf(os.Stderr, "%s: %s\n", Name, text)
	if s.File != nil {
		s.WriteString("1\n" + text)
		s.Close()
	}
	return 1
}

// proxy serves one port.
type proxy struct {
	lease *lease                // nil when the port is not published
	serve func(context.Context) // until the context ends; nil when there is no listener inside
}

// start makes the port work, or says why it cannot.
func start(ctx context.Context, o options, sock string, log *slog.Logger) (*proxy, error) {
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	publish, err := wanted(o, sock, log)
	if err != nil {
		return nil, err
	}
	p := &proxy{}
	closeInner, err := p.listen(ctx, o, publish, log)
	if err != nil {
		return nil, err
	}
	if !publish {
		return p, nil
	}
	p.lease = &lease{dial: func() (conn, error) { return dialGuest(sock) }, spec: o.spec(), log: log}
	reach, cancel := context.WithTimeoutCause(ctx, reachLimit, fmt.Errorf("no answer on %s within %v", sock, reachLimit))
	defer cancel()
	if err := p.lease.acquire(reach); err != nil {
		closeInner()
		return nil, err
	}
	return p, nil
}

func dialGuest(sock string) (conn, error) {
	c, err := api.DialGuest(sock)
	if err != nil {
		return nil, err
	}
	return c, nil
}

// wanted tells whether the port is to be published on the host.
func wanted(o options, sock string, log *slog.Logger) (bool, error) {
	if sock == "" {
		log.Warn("not published on the host: " + EnvSocket + " is not set")
		return false, nil
	}
	own, err := ownAddress(o.host.Addr())
	if own {
		log.Info("not published on the host: the address is the engine's own", slog.Any("address", o.host.Addr()))
	}
	return !own, err
}

// ownAddress tells whether a is an address of this namespace beyond its loopback.
func ownAddress(a netip.Addr) (bool, error) {
	if a.IsUnspecified() || a.IsLoopback() {
		return false, nil
	}
	list, err := net.InterfaceAddrs()
	return slices.ContainsFunc(list, func(n net.Addr) bool {
		p, err := netip.ParsePrefix(n.String())
		return err == nil && p.Addr().Unmap() == a
	}), err
}

// listen makes the listener inside. It may be without one if the port is published and
// the address is not of this namespace.
func (p *proxy) listen(ctx context.Context, o options, publish bool, log *slog.Logger) (closeInner func(), err error) {
	var inner interface{ Close() error }
	if o.proto == flow.TCP {
		inner, err = p.listenTCP(ctx, o, log)
	} else {
		inner, err = p.listenUDP(ctx, o, log)
	}
	if err == nil {
		return func() { inner.Close() }, nil
	}
	p.serve = nil
	if publish && !o.inherited && errors.Is(err, unix.EADDRNOTAVAIL) {
		return func() {}, nil
	}
	return nil, fmt.Errorf("listen on %v in the engine: %w", o, why(o, err))
}

// why leaves out what the caller says anyway, and names who has the port.
func why(o options, err error) error {
	if errors.Is(err, unix.EADDRINUSE) {
		if who := publish.HolderOf(o.proto, o.host); who != nil {
			return fmt.Errorf("port %d is taken by %v", o.host.Port(), who)
		}
	}
	if op := (*net.OpError)(nil); errors.As(err, &op) {
		err = op.Err
	}
	if sys := (*os.SyscallError)(nil); errors.As(err, &sys) {
		err = sys.Err
	}
	return err
}

func (p *proxy) listenTCP(ctx context.Context, o options, log *slog.Logger) (*net.TCPListener, error) {
	var l net.Listener
	var err error
	if o.inherited {
		l, err = inherited(net.FileListener)
	} else {
		var lc net.ListenConfig
		lc.SetMultipathTCP(false) // its sockets cannot be spliced
		l, err = lc.Listen(ctx, "tcp"+family(o.host), o.host.String())
	}
	if err != nil {
		return nil, err
	}
	ln, ok := l.(*net.TCPListener)
	if !ok {
		l.Close()
		return nil, fmt.Errorf("descriptor %d is a %s socket", listenFD, l.Addr().Network())
	}
	p.serve = (&tcpServer{ln: ln, container: o.container, log: log}).serve
	return ln, nil
}

func (p *proxy) listenUDP(ctx context.Context, o options, log *slog.Logger) (*net.UDPConn, error) {
	var l net.PacketConn
	var err error
	if o.inherited {
		l, err = inherited(net.FilePacketConn)
	} else {
		l, err = new(net.ListenConfig).ListenPacket(ctx, "udp"+family(o.host), o.host.String())
	}
	if err != nil {
		return nil, err
	}
	sock, ok := l.(*net.UDPConn)
	if !ok {
		l.Close()
		return nil, fmt.Errorf("descriptor %d is a %s socket", listenFD, l.LocalAddr().Network())
	}
	s, err := newUDPServer(sock, o.container, log)
	if err != nil {
		sock.Close()
		return nil, err
	}
	p.serve = s.serve
	return sock, nil
}

// inherited makes a listener of dockerd's descriptor with net.FileListener or
// net.FilePacketConn.
func inherited[T any](from func(*os.File) (T, error)) (l T, err error) {
	unix.CloseOnExec(listenFD)
	var st unix.Stat_t
	if err := unix.Fstat(listenFD, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		return l, fmt.Errorf("descriptor %d: %w", listenFD, errors.Join(err, fs.ErrInvalid))
	}
	f := os.NewFile(listenFD, "listener")
	defer f.Close() // from has made a copy
	return from(f)
}

// family is the last letter of a network's name, so that a listener on all IPv6
// addresses leaves the IPv4 ones alone.
func family(a netip.AddrPort) string {
	if a.Addr().Is4() {
		return "4"
	}
	return "6"
}

// run serves until ctx ends. The port is withdrawn then.
func (p *proxy) run(ctx context.Context) {
	var both sync.WaitGroup
	defer both.Wait()
	if p.serve != nil {
		both.Go(func() { p.serve(ctx) })
	}
	if p.lease != nil {
		both.Go(func() { p.lease.keep(ctx) })
	}
	<-ctx.Done()
}
