package forward

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// Tests across a router run in a child process in fresh namespaces, as root or not:
//
//	host (the child's own)          router                       world
//	198.51.100.1  ---- 198.51.100.2    203.0.113.1 ----  203.0.113.2
//	2001:db8:1::1 ---- 2001:db8:1::2   2001:db8:2::1 --- 2001:db8:2::2
//	          MTU 1500                          MTU 1400
//
// 192.0.2.0/24 and 2001:db8:f::/64 are routed to the router. There .4 and ::4 are
// unreachable, .5 and ::5 prohibited; the host itself prohibits .9 and ::9, has an MTU
// of 1300 to .8 and ::8 (which are in world), and no route to 192.88.99.0/24.

const childEnv = "SLIPWAY_FORWARD_TEST_CHILD"

var (
	nearRouter4, nearRouter6 = netip.MustParseAddr("198.51.100.2"), netip.MustParseAddr("2001:db8:1::2")
	world4, world6           = netip.MustParseAddr("203.0.113.2"), netip.MustParseAddr("2001:db8:2::2")
)

// topology is the shell script that makes it, run in the child.
const topology = `
mount -t tmpfs tmpfs /run
ip netns add router
ip netns add world
ip link set lo up
ip link add eth0 type veth peer name near netns router
ip -n router link add far mtu 1400 type veth peer name eth0 netns world
ip -n world link set eth0 mtu 1400
ip addr add 198.51.100.1/24 dev eth0
ip addr add 2001:db8:1::1/64 dev eth0 nodad
ip -n router addr add 198.51.100.2/24 dev near
ip -n router addr add 2001:db8:1::2/64 dev near nodad
ip -n router addr add 203.0.113.1/24 dev far
ip -n router addr add 2001:db8:2::1/64 dev far nodad
ip -n world addr add 203.0.113.2/24 dev eth0
ip -n world addr add 2001:db8:2::2/64 dev eth0 nodad
ip -n world addr add 192.0.2.8/32 dev eth0
ip -n world addr add 2001:db8:f::8/128 dev eth0 nodad
ip link set eth0 up
for d in lo near far; do ip -n router link set $d up; done
for d in lo eth0; do ip -n world link set $d up; done
ip -n world route add default via 203.0.113.1
ip -n world -6 route add default via 2001:db8:2::1
ip route add 203.0.113.0/24 via 198.51.100.2
ip route add 2001:db8:2::/64 via 2001:db8:1::2
ip route add 192.0.2.0/24 via 198.51.100.2
ip route add 2001:db8:f::/64 via 2001:db8:1::2
ip route add 192.0.2.8/32 via 198.51.100.2 mtu 1300
ip route add 2001:db8:f::8/128 via 2001:db8:1::2 mtu 1300
ip route add prohibit 192.0.2.9/32
ip route add prohibit 2001:db8:f::9/128
ip -n router route add 192.0.2.8/32 via 203.0.113.2
ip -n router route add 2001:db8:f::8/128 via 2001:db8:2::2
ip -n router route add unreachable 192.0.2.4/32
ip -n router route add unreachable 2001:db8:f::4/128
ip -n router route add prohibit 192.0.2.5/32
ip -n router route add prohibit 2001:db8:f::5/128
`

// routed reports whether the test runs in the child, with the topology up. Elsewhere
// it runs the test there and passes on how that ended.
func routed(t *testing.T) bool {
	t.Helper()
	if !inChild(t) {
		return false
	}
	setUpTopology(t)
	return true
}

// inChild is routed without the topology.
func inChild(t *testing.T) bool {
	t.Helper()
	if os.Getenv(childEnv) != "" {
		return true
	}
	args := []string{"-n", "-m"}
	if os.Geteuid() != 0 {
		args = []string{"-U", "-r", "-n", "-m"}
	}
	args = append(args, os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v", "-test.count=1")
	cmd := exec.CommandContext(t.Context(), "unshare", args...)
	cmd.Env = append(os.Environ(), childEnv+"=1")
	out, err := cmd.CombinedOutput()
	switch {
	case errors.Is(err, exec.ErrNotFound), strings.HasPrefix(string(out), "unshare: "):
		missing(t, fmt.Errorf("unshare: %w: %s", err, out))
	case err != nil:
		t.Errorf("in the namespaces: %v\n%s", err, out)
	default:
		t.Logf("in the namespaces:\n%s", out)
	}
	return false
}

// missing skips a test for want of something, and fails it where that must not be.
func missing(t *testing.T, err error) {
	t.Helper()
	if os.Getenv("NETNS_TESTS") == "require" {
		t.Fatalf("network namespaces unavailable: %v", err)
	}
	t.Skipf("network namespaces unavailable: %v", err)
}

var topologyUp sync.Once

func setUpTopology(t *testing.T) {
	t.Helper()
	topologyUp.Do(func() {
		if out, err := exec.Command("sh", "-ec", topology).CombinedOutput(); err != nil {
			t.Fatalf("set up topology: %v: %s", err, out)
		}
		for _, ns := range []string{"", "router", "world"} {
			inNamespace(t, ns, func() {
				setSysctl(t, "net/ipv4/ip_forward", "1")
				setSysctl(t, "net/ipv6/conf/all/forwarding", "1")
				setSysctl(t, "net/ipv4/icmp_ratemask", "0")
				setSysctl(t, "net/ipv6/icmp/ratelimit", "0")
			})
		}
	})
}

// inNamespace runs f on a thread in the named network namespace, or in ours for "".
func inNamespace(t *testing.T, name string, f func()) {
	t.Helper()
	var thread sync.WaitGroup
	thread.Go(func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		if name != "" {
			ns, err := os.Open("/run/netns/" + name)
			if err == nil {
				defer ns.Close()
				err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
			}
			if err != nil {
				t.Errorf("enter namespace %s: %v", name, err)
				return
			}
		}
		f()
	})
	thread.Wait()
}

// setSysctl sets a value of the calling thread's network namespace.
func setSysctl(t *testing.T, name, value string) {
	t.Helper()
	if err := os.WriteFile("/proc/sys/"+name, []byte(value), 0o644); err != nil {
		t.Errorf("set sysctl: %v", err)
	}
}

// worldEcho runs a UDP echo server in world and returns its port.
func worldEcho(t *testing.T) uint16 {
	t.Helper()
	var conn *net.UDPConn
	inNamespace(t, "world", func() {
		var err error
		if conn, err = net.ListenUDP("udp", nil); err != nil { // both families
			t.Error(err)
		}
	})
	if conn == nil {
		t.FailNow()
	}
	var loop sync.WaitGroup
	loop.Go(func() { serveEcho(conn) })
	t.Cleanup(func() {
		conn.Close()
		loop.Wait()
	})
	return conn.LocalAddr().(*net.UDPAddr).AddrPort().Port()
}

// flushPathMTU forgets what the host learned about paths.
func flushPathMTU(t *testing.T) {
	t.Helper()
	for _, family := range []string{"-4", "-6"} {
		if out, err := exec.Command("ip", family, "route", "flush", "cache").CombinedOutput(); err != nil {
			t.Errorf("flush path MTU: %v: %s", err, out)
		}
	}
}
