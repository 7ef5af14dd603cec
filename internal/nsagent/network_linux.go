package nsagent

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// txQueueLen is how many packets the TUN holds for the daemon. The kernel drops what
// does not fit (drivers/net/tun.c, tun_net_xmit: no queue behind the device ever makes
// a sender wait), so it must be larger than what TCP has in flight while the daemon is
// not scheduled: 1,000 connections with their initial window of 10 packets (RFC 6928).
// With offloads a packet has up to 64 KiB; what a guest can make the kernel hold is
// bounded by 10,000 of them.
const txQueueLen = 10000

// loopback is the index of lo, which is the first device of every namespace.
const loopback = 1

// network makes the TUN with its addresses and routes.
func (g *guest) network(r *Report) (*os.File, error) {
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, &Error{Op: "open", On: "rtnetlink", Err: err}
	}
	defer nl.Close()
	if err := g.loopbackUp(nl); err != nil {
		return nil, err
	}
	tun, index, err := openTUN(g.spec.TUN.Name)
	if err != nil {
		return nil, err
	}
	r.IPv6 = prepareIPv6(g.spec.TUN.Name)
	if err := g.configure(nl, index, r); err != nil {
		tun.Close()
		return nil, err
	}
	return tun, nil
}

// loopbackUp starts lo, and remembers to stop it in a namespace that is not ours.
func (g *guest) loopbackUp(nl *netlink.Handle) error {
	lo := &netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Name: "lo", Index: loopback}}
	if g.spec.Join != nil {
		if l, err := nl.LinkByIndex(loopback); err == nil && l.Attrs().Flags&net.FlagUp != 0 {
			return nil
		}
		had, err := nl.AddrList(lo, unix.AF_INET)
		g.undo = append(g.undo, func() {
			netlink.LinkSetDown(lo)
			if err == nil && len(had) == 0 { // the kernel has added it with up, and leaves it
				netlink.AddrDel(lo, &netlink.Addr{IPNet: ipNet(netip.MustParsePrefix("127.0.0.1/8"))})
			}
		})
	}
	if g.spec.Join == nil {
		g.widenLoopback(nl, lo)
	}
	if err := nl.LinkSetUp(lo); err != nil {
		return &Error{Op: "set up", On: "lo", Err: err, Hint: userNamespaceHint(err)}
	}
	return nil
}

// openTUN makes the device in our namespace; it lives as long as the file is open
// somewhere.
func openTUN(name string) (*os.File, int, error) {
	const path = "/dev/net/tun"
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, 0, &Error{Op: "open", On: path, Err: err, Hint: tunHint(err)}
	}
	tun := os.NewFile(uintptr(fd), path)
	index, err := makeTUN(fd, name)
	if err != nil {
		tun.Close()
		return nil, 0, &Error{Op: "create TUN", On: name, Err: err, Hint: tunHint(err)}
	}
	return tun, index, nil
}

// makeTUN attaches fd to a new device and returns its index. It has a virtio-net header
// in front of each packet, so that packets of up to 64 KiB cross in one system call.
func makeTUN(fd int, name string) (int, error) {
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return 0, err
	}
	ifr.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		return 0, err
	}
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(s)
	if err := unix.IoctlIfreq(s, unix.SIOCGIFINDEX, ifr); err != nil {
		return 0, err
	}
	return int(ifr.Uint32()), nil
}

// tunHint names the way to a usable /dev/net/tun.
func tunHint(err error) string {
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return "load the driver: sudo modprobe tun (in a container: --device /dev/net/tun)"
	case errors.Is(err, unix.EACCES):
		return "let everybody use it, as udev does by default: sudo chmod 0666 /dev/net/tun"
	case errors.Is(err, unix.EBUSY):
		return "another slipway serves this namespace already"
	case errors.Is(err, unix.EPERM):
		if h := userNamespaceHint(nil); h != "" {
			return h
		}
		return "the device must be allowed here (in a container: --device /dev/net/tun)"
	}
	return ""
}

// prepareIPv6 keeps the kernel from talking to the TUN on its own behalf: there is no
// router to solicit, no neighbour to ask, no second host that could have our address.
// It returns why there is no IPv6, if so.
func prepareIPv6(dev string) string {
	dir := "/proc/sys/net/ipv6/conf/" + dev + "/"
	if _, err := os.Stat(dir); err != nil {
		return "the host's kernel runs without IPv6"
	}
	for _, s := range []struct{ name, value string }{
		{"disable_ipv6", "0"},
		{"addr_gen_mode", "1"}, // no link-local address
		{"router_solicitations", "0"},
		{"accept_ra", "0"},
		{"autoconf", "0"},
		{"dad_transmits", "0"},
	} {
		// What cannot be written here (a read-only /proc/sys) costs a few packets;
		// an IPv6 that stays disabled is noticed when the address is added.
		os.WriteFile(dir+s.name, []byte(s.value), 0)
	}
	return ""
}

// configure starts the TUN with everything on it.
func (g *guest) configure(nl *netlink.Handle, index int, r *Report) error {
	spec := &g.spec
	link := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: spec.TUN.Name, Index: index}}
	for _, step := range []struct {
		what string
		do   func() error
	}{
		{"set txqueuelen", func() error { return nl.LinkSetTxQLen(link, txQueueLen) }},
		{"set mtu", func() error { return nl.LinkSetMTU(link, spec.TUN.MTU) }},
		{"set up", func() error { return nl.LinkSetUp(link) }},
	} {
		if err := step.do(); err != nil {
			return &Error{Op: step.what, On: spec.TUN.Name, Err: err}
		}
	}
	limit := time.Now().Add(localLimit)
	for _, p := range spec.Addresses {
		if p.Addr().Is6() && r.IPv6 != "" {
			continue
		}
		err := nl.AddrAdd(link, &netlink.Addr{IPNet: ipNet(p), Flags: addrFlags(p)})
		switch {
		case err != nil && p.Addr().Is6():
			r.IPv6 = fmt.Sprintf("add address on %s: %v", spec.TUN.Name, err)
		case err != nil:
			return &Error{Op: "add " + p.String(), On: spec.TUN.Name, Err: err}
		}
		if p.Addr().Is6() && r.IPv6 == "" {
			awaitLocal(nl, p.Addr(), limit)
		}
	}
	return g.routes(nl, index, r)
}

// localLimit bounds the wait for local addresses. A second was seen on a busy machine.
const localLimit = 5 * time.Second

// awaitLocal waits until the kernel takes a for its own. It makes the route of a new IPv6
// address later, in a work queue (net/ipv6/addrconf.c, addrconf_dad_work), and what is
// sent to the address before leaves by the device.
func awaitLocal(nl *netlink.Handle, a netip.Addr, limit time.Time) {
	for ; time.Now().Before(limit); time.Sleep(200 * time.Microsecond) {
		routes, err := nl.RouteGet(a.AsSlice())
		if err != nil || len(routes) > 0 && routes[0].Type == unix.RTN_LOCAL {
			return
		}
	}
}

// addrFlags skips duplicate address detection: during it the address does not work.
func addrFlags(p netip.Prefix) int {
	if p.Addr().Is6() {
		return unix.IFA_F_NODAD
	}
	return 0
}

// routes adds default and mirrored routes.
func (g *guest) routes(nl *netlink.Handle, index int, r *Report) error {
	for _, f := range []struct {
		gateway netip.Addr
		has     bool
		all     netip.Prefix
	}{
		{g.spec.Gateway4, g.spec.Default4, netip.PrefixFrom(netip.IPv4Unspecified(), 0)},
		{g.spec.Gateway6, g.spec.Default6, netip.PrefixFrom(netip.IPv6Unspecified(), 0)},
	} {
		if f.all.Addr().Is6() && r.IPv6 != "" {
			continue
		}
		if err := g.defaultRoute(nl, index, f.all, f.gateway, f.has && f.gateway.IsValid()); err != nil {
			return err
		}
		if !f.gateway.IsValid() {
			continue
		}
		for _, p := range g.spec.Mirror {
			if p.Addr().Is4() != f.gateway.Is4() {
				continue
			}
			err := nl.RouteAdd(&netlink.Route{LinkIndex: index, Dst: ipNet(p.Masked()), Gw: f.gateway.AsSlice()})
			if err != nil && !errors.Is(err, unix.EEXIST) {
				r.Routes = append(r.Routes, fmt.Sprintf("%v: %v", p, err))
			}
		}
	}
	return nil
}

// defaultRoute adds a default route by the gateway, or one that says at once that the
// rest of the world is unreachable. A namespace of somebody else's does without the
// latter: it would stay behind there if we were killed, and the kernel says nearly
// the same without any route.
func (g *guest) defaultRoute(nl *netlink.Handle, index int, all netip.Prefix, gateway netip.Addr, has bool) error {
	route := &netlink.Route{LinkIndex: index, Dst: ipNet(all), Gw: gateway.AsSlice()}
	if !has {
		if g.spec.Join != nil {
			return nil
		}
		route = &netlink.Route{Dst: ipNet(all), Type: unix.RTN_UNREACHABLE}
	}
	if err := nl.RouteAdd(route); err != nil {
		return &Error{Op: "add default route", On: g.spec.TUN.Name, Err: err}
	}
	return nil
}

// refuseDefaultRoute returns an error if the namespace has a way to the world already.
func (g *guest) refuseDefaultRoute() error {
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		routes, err := netlink.RouteList(nil, family)
		if err != nil {
			return &Error{Op: "list routes", On: g.spec.Join.name(), Err: err}
		}
		for _, r := range routes {
			if r.Dst != nil {
				if ones, _ := r.Dst.Mask.Size(); ones > 0 {
					continue
				}
			}
			hint := "remove it first: ip route del default"
			if family == unix.AF_INET6 {
				hint = "remove it first: ip -6 route del default"
			}
			return &Error{Op: "attach", On: g.spec.Join.name(), Err: ErrHasDefaultRoute,
				Hint: strings.TrimSpace(hint + " (in that namespace)")}
		}
	}
	return nil
}

// ipNet converts a prefix, keeping the bits after it.
func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{
		IP:   p.Addr().AsSlice(),
		Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen()),
	}
}
