package nsagent

import (
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"
)

// Settings of the namespace that published ports are about.

// How long conntrack remembers a UDP mapping after its last datagram: one that has had
// answers for longer than two seconds (stream), and any other.
const (
	udpTimeout       = "netfilter/nf_conntrack_udp_timeout"
	udpTimeoutStream = "netfilter/nf_conntrack_udp_timeout_stream"

	// wantUDPTimeout, in seconds, is longer than slipway's own mapping of a published
	// port, 90: a container's late answer then still has the address that was asked.
	wantUDPTimeout = 120
	// What a kernel begins with, also one that has yet to load conntrack
	// (net/netfilter/nf_conntrack_proto_udp.c, udp_timeouts).
	firstUDPTimeout, firstUDPTimeoutStream = 30, 120
)

// localPortRange is the range of ports for sockets that ask for none. Every new namespace
// begins with the same (net/ipv4/af_inet.c, inet_init_net).
const (
	localPortRange                 = "ipv4/ip_local_port_range"
	firstLocalPort, finalLocalPort = 32768, 60999
)

// settlePorts sets what published ports need where the namespace is ours alone, and
// reports what there is. It comes after the rules, as these load conntrack.
func (g *guest) settlePorts(r *Report) {
	own := g.spec.Join == nil
	r.UDPTimeout = min(settleUDP(udpTimeout, firstUDPTimeout, own), settleUDP(udpTimeoutStream, firstUDPTimeoutStream, own))
	r.LocalPorts = localPorts()
	if g.spec.NonlocalBind {
		r.NonlocalBind = allowNonlocalBind(own)
	}
}

// settleUDP raises one of the two times if it may, and returns it. What is longer stays.
func settleUDP(name string, first int, own bool) int {
	s, err := readNetSysctl(name)
	now, bad := strconv.Atoi(s)
	switch {
	case err != nil || bad != nil:
		return first
	case own && now < wantUDPTimeout && changeNetSysctl(name, strconv.Itoa(wantUDPTimeout)) == nil:
		return wantUDPTimeout
	}
	return now
}

func localPorts() [2]uint16 {
	s, _ := readNetSysctl(localPortRange)
	low, high, _ := strings.Cut(s, "\t")
	first, err1 := strconv.ParseUint(low, 10, 16)
	last, err2 := strconv.ParseUint(high, 10, 16)
	if err1 != nil || err2 != nil {
		return [2]uint16{firstLocalPort, finalLocalPort}
	}
	return [2]uint16{uint16(first), uint16(last)}
}

// allowNonlocalBind lets the guest's programs listen on addresses that it does not have:
// dockerd starts its proxy on the very address of -p ADDRESS:PORT:PORT, the host's. It
// returns why they may not.
func allowNonlocalBind(own bool) string {
	for _, name := range []string{"ipv4/ip_nonlocal_bind", "ipv6/ip_nonlocal_bind"} {
		words := "net." + strings.ReplaceAll(name, "/", ".")
		now, err := readNetSysctl(name)
		switch {
		case now == "1", errors.Is(err, fs.ErrNotExist): // a kernel without IPv6
		case !own:
			return words + " is " + now
		default:
			if err := changeNetSysctl(name, "1"); err != nil {
				return fmt.Sprintf("%s cannot be set: %v", words, err)
			}
		}
	}
	return ""
}
