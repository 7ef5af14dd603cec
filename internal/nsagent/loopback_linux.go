package nsagent

import (
	"net"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A segment on loopback may be larger than 64 KiB (BIG TCP: net/core/sock.c,
// sk_dst_gso_max_size; Linux 5.19 for IPv6, 6.3 for IPv4), which is what the bytes of ports
// gain from that are published for a server in the namespace itself: fewer packets pass the
// guest's rules.
//
// A connection that the guest translates to a container begins on loopback, too, and leaves
// by a bridge that takes 64 KiB; the kernel would cut what is larger into single packets
// (net/core/dev.c, gso_features_check), a fifth of the speed. So loopback is as the kernel
// made it from the moment that there is a device besides it and the TUN. A limit to the
// number of a segment's packets, which devices have as well, is no way to have both: it
// would cut what comes from sockets of other devices, and UDP_SEGMENT.
//
// The price: rules in INPUT see IPv4 packets whose length field is 0, and IPv6 ones with a
// hop-by-hop header (docs/troubleshooting.md).

const (
	loopbackSegment = 256 << 10 // bytes
	// ordinarySegment is what a device has when it is made (include/linux/netdevice.h,
	// GSO_LEGACY_MAX_SIZE).
	ordinarySegment = 64 << 10
)

// widenLoopback allows large segments on lo, which is down, where the kernel can, until
// another device is up.
func (g *guest) widenLoopback(nl *netlink.Handle, lo netlink.Link) {
	if setLoopbackSegment(nl, lo, loopbackSegment) != nil {
		return
	}
	updates, done := make(chan netlink.LinkUpdate), make(chan struct{})
	if err := netlink.LinkSubscribe(updates, done); err != nil {
		g.narrowLoopback(lo)
		return
	}
	go func() { // ends with the process, or with the first such device
		for u := range updates {
			if a := u.Attrs(); u.Header.Type == unix.RTM_NEWLINK && a.Flags&net.FlagUp != 0 && a.Index != loopback && a.Name != g.spec.TUN.Name {
				break
			}
		}
		g.narrowLoopback(lo)
		close(done)
		for range updates { // the subscription ends
		}
	}()
}

// narrowLoopback makes lo as the kernel made it.
func (g *guest) narrowLoopback(lo netlink.Link) {
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err == nil {
		defer nl.Close()
		err = setLoopbackSegment(nl, lo, ordinarySegment)
	}
	if err != nil {
		g.logf("set the size of segments", "lo", err)
	}
}

// setLoopbackSegment sets the limit for both families: some kernels compare a packet of
// either with IPv6's. Before 6.3 they ignore that for IPv4.
func setLoopbackSegment(nl *netlink.Handle, lo netlink.Link, size int) error {
	if err := nl.LinkSetGSOMaxSize(lo, size); err != nil {
		return err
	}
	return nl.LinkSetGSOIPv4MaxSize(lo, size)
}
