package nsagent

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
)

// Settings of the namespace that would have the kernel drop what the kernel path brings
// back. Most are about the route by which the answer to a packet would leave. There are
// no such settings for IPv6.

// sysctlDir is the directory of names such as "conf/all/rp_filter".
const sysctlDir = netDir + "ipv4/"

// admit makes room for our packets in a family of which that is said above. own tells
// whether the namespace is ours alone.
func admit(tun string, own bool) error {
	if err := admitMarks(own); err != nil {
		return err
	}
	return admitSources(tun)
}

// admitMarks sees to it that our bits in a packet's mark mean nothing but where that
// packet goes. The first two settings have a mark also choose the way back to the packet's
// sender, which then seems to be local; a new namespace has them from the host, where VPNs
// set them (wg-quick does). The third has accepted sockets take the mark over, which is
// what the gateway's bit is for; a guest of somebody else's does without.
func admitMarks(own bool) error {
	accept := "0"
	if own {
		accept = "1"
	}
	for _, s := range []struct{ name, value string }{
		{"conf/all/src_valid_mark", "0"}, {"conf/default/src_valid_mark", "0"}, {acceptMark, accept},
	} {
		now, err := readSysctl(s.name)
		if err != nil || now == s.value { // an old kernel does not have them all
			continue
		}
		if !own {
			return fmt.Errorf("%s is %s", sysctlName(s.name), now)
		}
		if err := changeSysctl(s.name, s.value); err != nil && s.name != acceptMark {
			return fmt.Errorf("%s is %s and cannot be changed: %w", sysctlName(s.name), now, err)
		}
	}
	return nil
}

// acceptMark is the setting with which accepted sockets have the mark of their SYN.
const acceptMark = "tcp_fwmark_accept"

// admitSources lets the guest's packets come in again by the device, with sources that
// are the namespace's own (accept_local) or behind another device of it: any that has a
// route (rp_filter 2, RFC 3704 section 2.4). Of the device's value and that of all
// devices the kernel takes the larger, so 0 would not do where a host is strict (1). The
// device is ours and goes with us.
func admitSources(tun string) error {
	local, filter := "conf/"+tun+"/accept_local", "conf/"+tun+"/rp_filter"
	if err := changeSysctl(local, "1"); err != nil {
		return fmt.Errorf("%s cannot be set: %w", sysctlName(local), err)
	}
	if err := changeSysctl(filter, "2"); err != nil {
		return fmt.Errorf("%s cannot be set: %w", sysctlName(filter), err)
	}
	return nil
}

// reusePorts lets connections to published ports use a port of the gateway's again after
// a second, where timestamps tell old packets (RFC 6191). All clients of the host's
// loopback come from that one address, and each that closes first leaves a port in
// TIME_WAIT for a minute; natively the kernel does the same for its loopback. Without it
// more than 1,000 connections a second to one port do not last long.
func reusePorts() { changeSysctl("tcp_tw_reuse", "1") }

// sysctlName is a name as sysctl(8) has it.
func sysctlName(name string) string { return "net.ipv4." + strings.ReplaceAll(name, "/", ".") }

func readSysctl(name string) (string, error) { return readNetSysctl("ipv4/" + name) }

// changeSysctl writes it unless it has that value. The error is without the path.
func changeSysctl(name, value string) error { return changeNetSysctl("ipv4/"+name, value) }

// netDir is the directory of names such as "ipv6/ip_nonlocal_bind".
const netDir = "/proc/sys/net/"

func readNetSysctl(name string) (string, error) {
	b, err := os.ReadFile(netDir + name)
	return string(bytes.TrimSpace(b)), err
}

// changeNetSysctl is changeSysctl for every setting of the network.
func changeNetSysctl(name, value string) error {
	if now, err := readNetSysctl(name); err == nil && now == value {
		return nil
	}
	err := os.WriteFile(netDir+name, []byte(value), 0)
	var path *os.PathError
	if errors.As(err, &path) {
		err = path.Err
	}
	return err
}
