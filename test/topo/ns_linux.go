package topo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// NS is a network namespace, held by a descriptor. Its methods may be called by
// several goroutines.
type NS struct {
	Name string
	file *os.File
}

// NewNS makes an empty namespace with lo up.
func NewNS(name string) (*NS, error) {
	type made struct {
		file *os.File
		err  error
	}
	ch := make(chan made, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			ch <- made{nil, err}
			return
		}
		f, err := os.Open("/proc/thread-self/ns/net")
		ch <- made{f, err}
	}()
	m := <-ch
	if m.err != nil {
		return nil, fmt.Errorf("namespace %s: %w", name, m.err)
	}
	n := &NS{Name: name, file: m.file}
	// Duplicate address detection would hold every IPv6 address back for a second.
	err := errors.Join(
		n.Sysctl("net.ipv6.conf.default.accept_dad", "0"),
		n.Sysctl("net.ipv6.conf.all.accept_dad", "0"),
		n.IP("link set lo up"),
	)
	if err != nil {
		n.Close()
		return nil, err
	}
	return n, nil
}

// OpenNS opens an existing namespace, for instance /proc/PID/ns/net.
func OpenNS(name, path string) (*NS, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("namespace %s: %w", name, err)
	}
	return &NS{Name: name, file: f}, nil
}

// Close lets go of the namespace. What still runs or is open in it keeps it.
func (n *NS) Close() {
	if n != nil {
		n.file.Close()
	}
}

// Inode identifies the namespace as in /proc/PID/ns/net.
func (n *NS) Inode() uint64 {
	var st unix.Stat_t
	if err := unix.Fstat(int(n.file.Fd()), &st); err != nil {
		return 0
	}
	return st.Ino
}

// Do runs fn on a thread of its own inside the namespace and waits for it.
// Sockets that fn makes, and processes that it starts, belong to the namespace
// for good. Goroutines that fn starts are outside. fn must not end its
// goroutine (testing.T's FailNow).
func (n *NS) Do(fn func() error) error {
	ch := make(chan error, 1)
	go func() {
		defer close(ch)
		runtime.LockOSThread() // never unlocked, see NewNS
		if err := unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET); err != nil {
			ch <- fmt.Errorf("enter namespace %s: %w", n.Name, err)
			return
		}
		ch <- fn()
	}()
	return <-ch
}

// Sysctl writes one network sysctl of the namespace, "net.ipv4.ip_forward".
func (n *NS) Sysctl(name, value string) error {
	// A dot inside an interface name would need escaping; ours have none.
	path := "/proc/sys/" + strings.ReplaceAll(name, ".", "/")
	return n.Do(func() error { return os.WriteFile(path, []byte(value), 0o644) })
}

// awaitLocal waits until the kernel takes IPv6 addresses for the namespace's own, which it
// does later than it adds them, in a work queue (net/ipv6/addrconf.c, addrconf_dad_work): on a
// busy machine a second later.
func (n *NS) awaitLocal(addrs ...netip.Addr) error {
	return n.Do(func() error {
		end := time.Now().Add(20 * time.Second)
		for _, a := range addrs {
			for {
				routes, err := netlink.RouteGet(a.AsSlice())
				if len(routes) > 0 && routes[0].Type == unix.RTN_LOCAL {
					break
				}
				if time.Now().After(end) {
					return fmt.Errorf("address %v in %s: no local route after 20 s: %v, %v", a, n.Name, routes, err)
				}
				time.Sleep(200 * time.Microsecond)
			}
		}
		return nil
	})
}

// Start starts cmd inside the namespace.
func (n *NS) Start(cmd *exec.Cmd) error { return n.Do(cmd.Start) }

// Run runs a command inside the namespace, with stdin as input, and returns what
// it printed on both outputs.
func (n *NS) Run(stdin string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Stdin = strings.NewReader(stdin)
	return n.output(cmd)
}

func (n *NS) output(cmd *exec.Cmd) (string, error) {
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := n.Start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		return out.String(), fmt.Errorf("%s in %s: %w: %s", strings.Join(cmd.Args, " "), n.Name, err, out.String())
	}
	return out.String(), nil
}

// IP carries out ip(8) commands, one a line, stopping at the first that fails.
func (n *NS) IP(batch string) error {
	_, err := n.Run(batch, "ip", "-batch", "-")
	return err
}

// NFT loads an nft(8) script.
func (n *NS) NFT(script string) error {
	_, err := n.Run(script, "nft", "-f", "-")
	return err
}

// Dial connects from inside the namespace. address must be literal: a resolver
// would leave the thread, and with it the namespace.
func (n *NS) Dial(network, address string, timeout time.Duration) (c net.Conn, err error) {
	err = n.Do(func() (err error) {
		c, err = net.DialTimeout(network, address, timeout)
		return err
	})
	return c, err
}

// DialFrom is Dial from the local address local, "192.0.2.1:0".
func (n *NS) DialFrom(network, local, address string) (c net.Conn, err error) {
	d := net.Dialer{Timeout: 10 * time.Second}
	switch network {
	case "tcp":
		d.LocalAddr, err = net.ResolveTCPAddr(network, local)
	default:
		d.LocalAddr, err = net.ResolveUDPAddr(network, local)
	}
	if err != nil {
		return nil, err
	}
	err = n.Do(func() (err error) {
		c, err = d.Dial(network, address)
		return err
	})
	return c, err
}

// Listen listens on a TCP address inside the namespace.
func (n *NS) Listen(address string) (l net.Listener, err error) {
	err = n.Do(func() (err error) {
		l, err = net.Listen("tcp", address)
		return err
	})
	return l, err
}

// ListenUDP binds a UDP socket inside the namespace.
func (n *NS) ListenUDP(address string) (c *net.UDPConn, err error) {
	a, err := net.ResolveUDPAddr("udp", address)
	if err != nil {
		return nil, err
	}
	err = n.Do(func() (err error) {
		c, err = net.ListenUDP("udp", a)
		return err
	})
	return c, err
}
