//go:build linux

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// outside is what the load tool in a container is told of the namespace around it.
type outside struct {
	DeviceFile string // its /proc/net/dev
	Congestion string // in force there
}

// bridgeRules are the ones dockerd makes for its default bridge, and for one with
// IPv6.
const bridgeRules = `
table ip nat {
	chain POSTROUTING {
		type nat hook postrouting priority srcnat; policy accept;
		ip saddr 172.17.0.0/16 oifname != "docker0" masquerade
	}
}
table ip6 nat {
	chain POSTROUTING {
		type nat hook postrouting priority srcnat; policy accept;
		ip6 saddr 2001:db8:172::/64 oifname != "docker0" masquerade
	}
}
`

// bridgeMain runs one order as a container would: in a network namespace of its own,
// joined by veth to a bridge in ours, which forwards and masquerades. All of it is
// made from within the guest, so that it is the same under every driver, and ends
// with the namespace.
func bridgeMain(args []string) error {
	var o order
	if len(args) != 1 {
		return errors.New("bridge: one argument wanted")
	}
	if err := json.Unmarshal([]byte(args[0]), &o); err != nil {
		return fmt.Errorf("bridge: order: %w", err)
	}
	cc, err := setCongestion(o.Want)
	if err != nil {
		return err
	}
	container, err := newNamespace()
	if err != nil {
		return fmt.Errorf("bridge: %w", err)
	}
	defer container.Close()
	path := fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), container.Fd())
	if err := bridgeTo(path); err != nil {
		return fmt.Errorf("bridge: %w", err)
	}
	o.Outside = &outside{DeviceFile: fmt.Sprintf("/proc/%d/net/dev", os.Getpid()), Congestion: cc}
	arg, err := json.Marshal(o)
	if err != nil {
		return err
	}
	self, err := selfPath()
	if err != nil {
		return err
	}
	cmd := exec.Command(self, argGuest, string(arg))
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	if err := inNamespaceOf(path, cmd.Start); err != nil {
		return fmt.Errorf("bridge: %w", err)
	}
	return cmd.Wait()
}

// newNamespace makes a network namespace and returns the file that keeps it.
func newNamespace() (*os.File, error) {
	runtime.LockOSThread() // for good when there is no way back
	const own = "/proc/thread-self/ns/net"
	home, err := os.Open(own)
	if err != nil {
		return nil, err
	}
	defer home.Close()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return nil, fmt.Errorf("unshare network namespace: %w", err)
	}
	made, err := os.Open(own)
	if back := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); back != nil {
		return nil, errors.Join(err, fmt.Errorf("setns back: %w", back))
	}
	runtime.UnlockOSThread()
	return made, err
}

// bridgeTo makes the bridge here and the container's end in the namespace at path.
func bridgeTo(path string) error {
	return firstError(
		func() error {
			return ipBatch("", "link add docker0 type bridge",
				"link add veth0 mtu 1500 type veth peer name eth0 mtu 1500 netns "+path,
				"link set veth0 master docker0", "link set veth0 up", "link set docker0 up",
				"addr add 172.17.0.1/16 dev docker0", "addr add 2001:db8:172::1/64 dev docker0 nodad")
		},
		func() error { return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0) },
		func() error { return os.WriteFile("/proc/sys/net/ipv6/conf/all/forwarding", []byte("1"), 0) },
		loadRules,
		func() error {
			return inNamespaceOf(path, func() error {
				return ipBatch("", "link set lo up", "link set eth0 up", "addr add 172.17.0.2/16 dev eth0", "addr add 2001:db8:172::2/64 dev eth0 nodad",
					"route add default via 172.17.0.1", "route add default via 2001:db8:172::1")
			})
		},
	)
}

// loadRules loads bridgeRules into this network namespace.
func loadRules() error {
	cmd := exec.Command("nft", "-f", "-")
	cmd.Stdin = strings.NewReader(bridgeRules)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("nft: %w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}
