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
const sysctlDir = "/proc/sys/net/ipv4/"

// admit makes room for our packets in a family of which that is said above. own tells
// whether the namespace is ours alone.
func (k *kernelFamily) admit(tun string, own bool) error {
	if err := admitMarks(own); err != nil {
		return err
	}
	return k.admitSources(tun)
}

// admitMarks sees to it that our bit in a packet's mark means nothing but where that
// packet goes. The first setting has it also choose the way back to the packet's sender,
// which then seems to be local; a new namespace has it from the host, where VPNs set it
// (wg-quick does). The second has accepted sockets take it over. A guest of somebody
// else's may need them.
func admitMarks(own bool) error {
	for _, name := range []string{"conf/all/src_valid_mark", "conf/default/src_valid_mark", "tcp_fwmark_accept"} {
		now, err := readSysctl(name)
		if err != nil || now != "1" { // an old kernel does not have them all
			continue
		}
		if !own {
			return fmt.Errorf("%s is 1", sysctlName(name))
		}
		if err := changeSysctl(name, "0"); err != nil {
			return fmt.Errorf("%s is 1 and cannot be changed: %w", sysctlName(name), err)
		}
	}
	return nil
}

// admitSources lets the guest's packets come in again by the device, with sources that
// are the namespace's own (accept_local) or behind another device of it (rp_filter, by
// RFC 3704 section 2.2). The device is ours and goes with us.
func (k *kernelFamily) admitSources(tun string) error {
	local, filter := "conf/"+tun+"/accept_local", "conf/"+tun+"/rp_filter"
	if err := changeSysctl(local, "1"); err != nil {
		return fmt.Errorf("%s cannot be set: %w", sysctlName(local), err)
	}
	tunErr := changeSysctl(filter, "0")
	all, err := readSysctl("conf/all/rp_filter")
	if err != nil {
		return err
	}
	if all == "2" { // loose, and stronger than what the device says
		return nil
	}
	if tunErr != nil {
		return fmt.Errorf("%s cannot be set: %w", sysctlName(filter), tunErr)
	}
	if all == "1" {
		if err := k.makeRoom(tun); err != nil {
			return fmt.Errorf("net.ipv4.conf.all.rp_filter is 1 and cannot be changed: %w", err)
		}
	}
	return nil
}

// makeRoom turns strict filtering of every device, which no device can be excepted from
// (the kernel takes the larger value), into strict filtering of each but ours.
func (k *kernelFamily) makeRoom(tun string) error {
	// New devices first, so that none slips through.
	if err := k.makeStrict("default"); err != nil {
		return err
	}
	devices, err := os.ReadDir(sysctlDir + "conf")
	if err != nil {
		return err
	}
	for _, d := range devices {
		if n := d.Name(); n == "all" || n == "default" || n == tun {
			continue
		}
		if err := k.makeStrict(d.Name()); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return k.changeFilter("all", "1", "0")
}

// makeStrict makes a device's own filtering strict unless there is some.
func (k *kernelFamily) makeStrict(device string) error {
	now, err := readSysctl("conf/" + device + "/rp_filter")
	if err != nil || now != "0" {
		return err
	}
	return k.changeFilter(device, "0", "1")
}

// changeFilter sets an rp_filter. Taking it back leaves alone what somebody has set
// since.
func (k *kernelFamily) changeFilter(device, from, to string) error {
	name := "conf/" + device + "/rp_filter"
	if err := changeSysctl(name, to); err != nil {
		return err
	}
	k.undo = append(k.undo, func() {
		if now, err := readSysctl(name); err == nil && now == to {
			changeSysctl(name, from)
		}
	})
	return nil
}

// sysctlName is a name as sysctl(8) has it.
func sysctlName(name string) string { return "net.ipv4." + strings.ReplaceAll(name, "/", ".") }

func readSysctl(name string) (string, error) {
	b, err := os.ReadFile(sysctlDir + name)
	return string(bytes.TrimSpace(b)), err
}

// changeSysctl writes it unless it has that value. The error is without the path.
func changeSysctl(name, value string) error {
	if now, err := readSysctl(name); err == nil && now == value {
		return nil
	}
	err := os.WriteFile(sysctlDir+name, []byte(value), 0)
	var path *os.PathError
	if errors.As(err, &path) {
		err = path.Err
	}
	return err
}
