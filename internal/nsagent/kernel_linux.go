package nsagent

import (
	"errors"
	"fmt"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The agent's part of the kernel path: listeners in the namespace, and what brings the
// guest's connections to them. The rules are in rules_linux.go; they mark the packets
// that are to stay, and a rule of ip-rule(8) and a route make it so.
const (
	// kernelRoutes is the number of the table with our route, taken at random from
	// those that no daemon has a habit of.
	kernelRoutes = 7965
	// kernelRulePriority is after the local addresses, 0, and before all that people
	// and VPNs usually add.
	kernelRulePriority = 100
	// listenBacklog is as much as net.core.somaxconn allows.
	listenBacklog = 65535
)

// Options of a guest's connections, which accepted sockets inherit from the listener.
// Keep-alives find a guest that went without a word (a container that was killed) after
// four minutes; the host's side has the same.
const (
	keepIdle     = 120 // seconds
	keepInterval = 15  // seconds
	keepCount    = 8
	// synRetries bounds how long a handshake is pending that the guest does not
	// complete, 15 seconds: the daemon has connected the target for it by then.
	synRetries = 3
	congestion = "cubic"
)

// KernelSockets are the sockets in the guest's namespace that the kernel path needs.
// Those of a family that has none are nil.
type KernelSockets struct {
	// Listener4 and Listener6 accept the guest's connections: transparent TCP
	// sockets, non-blocking, at the gateway's address, which no packet but those
	// that our rules send ever reaches. An accepted socket has the address of the
	// target, and as its peer the guest.
	Listener4, Listener6 *os.File
	// Probe4 and Probe6 are TCP sockets of the namespace for the self-test, neither
	// bound nor connected, non-blocking.
	Probe4, Probe6 *os.File
}

// kernelPath is what the agent has made of it.
type kernelPath struct {
	ip4, ip6 kernelFamily
}

// kernelFamily is one family of it.
type kernelFamily struct {
	listener, probe *os.File
	listen          netip.AddrPort // where listener is; not valid if there is none
	undo            []func()       // last first
}

// on tells whether there is a kernel path so far.
func (k *kernelPath) on() bool { return k.ip4.listen.IsValid() }

// prepareKernel makes everything but the rules. What is missing is in the report.
func (g *guest) prepareKernel(r *Report) *kernelPath {
	k := new(kernelPath)
	if !g.spec.KernelPath {
		return k
	}
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		r.Kernel = fmt.Sprintf("open rtnetlink: %v", err)
		return k
	}
	defer nl.Close()
	err = k.ip4.prepare(nl, g.spec.Gateway4)
	if err == nil {
		err = admit(g.spec.TUN.Name, g.spec.Join == nil)
	}
	if g.spec.Join == nil {
		reusePorts()
	}
	if err != nil {
		r.Kernel = err.Error()
		k.ip4.discard()
		return k
	}
	if r.IPv6 != "" {
		r.Kernel6 = r.IPv6
	} else if err := k.ip6.prepare(nl, g.spec.Gateway6); err != nil {
		r.Kernel6 = err.Error()
		k.ip6.discard()
	}
	return k
}

// settleKernel discards the families whose rules could not be loaded, and remembers
// what to take back of the others.
func (g *guest) settleKernel(k *kernelPath, r *Report) {
	if r.Kernel != "" {
		r.Kernel6 = ""
		k.ip4.discard()
	}
	if r.Kernel != "" || r.Kernel6 != "" {
		k.ip6.discard()
	}
	if g.spec.Join != nil { // else the end of the namespace does it
		g.kernelUndo = append(k.ip4.undo, k.ip6.undo...)
	}
}

// files returns the sockets by their names on the wire.
func (k *kernelPath) files() map[string]*os.File {
	return map[string]*os.File{
		wireListener4: k.ip4.listener, wireProbe4: k.ip4.probe,
		wireListener6: k.ip6.listener, wireProbe6: k.ip6.probe,
	}
}

// discard takes everything back.
func (k *kernelFamily) discard() {
	closeAll([]*os.File{k.listener, k.probe})
	for i := len(k.undo) - 1; i >= 0; i-- {
		k.undo[i]()
	}
	*k = kernelFamily{}
}

// prepare makes the sockets and the route of a family. The caller discards after an
// error.
func (k *kernelFamily) prepare(nl *netlink.Handle, gateway netip.Addr) error {
	if !gateway.IsValid() {
		return errors.New("the guest has no gateway of this family")
	}
	var err error
	if k.listener, k.listen, err = listenTransparent(gateway); err != nil {
		return fmt.Errorf("listen on %v: %w", gateway, err)
	}
	fd, err := unix.Socket(familyOf(gateway), unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return fmt.Errorf("open a socket: %w", err)
	}
	k.probe = os.NewFile(uintptr(fd), "probe")
	return k.route(nl, gateway)
}

// familyOf returns the address family.
func familyOf(a netip.Addr) int {
	if a.Is6() {
		return unix.AF_INET6
	}
	return unix.AF_INET
}

// listenTransparent listens on a free port of an address that the namespace need not
// have: it is not one of its own, so nobody reaches the listener by dialling it.
func listenTransparent(a netip.Addr) (*os.File, netip.AddrPort, error) {
	// By hand, as package net makes MPTCP listeners, whose connections cost more.
	fd, err := unix.Socket(familyOf(a), unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return nil, netip.AddrPort{}, err
	}
	port, err := listenOn(fd, a)
	if err != nil {
		unix.Close(fd)
		return nil, netip.AddrPort{}, err
	}
	return os.NewFile(uintptr(fd), "listener"), netip.AddrPortFrom(a, uint16(port)), nil
}

// listenOn makes fd a listener and returns its port.
func listenOn(fd int, a netip.Addr) (port int, err error) {
	var sa unix.Sockaddr
	if a.Is4() {
		sa = &unix.SockaddrInet4{Addr: a.As4()}
	} else {
		sa = &unix.SockaddrInet6{Addr: a.As16()}
		err = unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_V6ONLY, 1)
	}
	if err == nil {
		err = makeTransparent(fd, familyOf(a))
	}
	if err == nil {
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, gatewayMark)
	}
	if err == nil {
		err = guestOptions(fd)
	}
	if err == nil {
		err = unix.Bind(fd, sa)
	}
	if err == nil {
		err = unix.Listen(fd, listenBacklog)
	}
	if err != nil {
		return 0, err
	}
	if sa, err = unix.Getsockname(fd); err != nil {
		return 0, err
	}
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return sa.Port, nil
	case *unix.SockaddrInet6:
		return sa.Port, nil
	}
	return 0, unix.EAFNOSUPPORT
}

// route keeps marked packets in the namespace, and those with the gateway's bit that are
// to one of the ports of its connections. What a killed agent has left is as good.
func (k *kernelFamily) route(nl *netlink.Handle, gateway netip.Addr) error {
	marked, answers := netlink.NewRule(), netlink.NewRule()
	marked.Mark, marked.Mask = KernelMark, new(uint32(KernelMark))
	answers.Mark, answers.Mask = gatewayMark, new(uint32(gatewayMark))
	answers.Dst, answers.IPProto = ipNet(netip.PrefixFrom(gateway, gateway.BitLen())), unix.IPPROTO_TCP
	answers.Dport = netlink.NewRulePortRange(firstGatewayPort, lastGatewayPort)
	for _, rule := range []*netlink.Rule{marked, answers} {
		rule.Family, rule.Priority, rule.Table = familyOf(gateway), kernelRulePriority, kernelRoutes
		if err := nl.RuleAdd(rule); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("ip rule add fwmark %#x: %w", rule.Mark, err)
		}
		k.undo = append(k.undo, func() { netlink.RuleDel(rule) })
	}
	all := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	if gateway.Is6() {
		all = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	route := &netlink.Route{LinkIndex: loopback, Dst: ipNet(all), Table: kernelRoutes,
		Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST}
	if err := nl.RouteAdd(route); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("ip route add local default: %w", err)
	}
	k.undo = append(k.undo, func() { netlink.RouteDel(route) })
	return nil
}
