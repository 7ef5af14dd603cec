package probe

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// Linux tells a connected socket, ping or raw, of ICMP "administratively prohibited":
// that is how a denied host address is told from a silent one. Proved in a namespace
// whose firewall says so.
func TestHostStateDenied(t *testing.T) {
	const inside = "SLIPWAY_PROBE_TEST_INSIDE"
	if os.Getenv(inside) != "" {
		deniedInside(t)
		return
	}
	if _, err := exec.LookPath("nft"); err != nil {
		missing(t, err)
	}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^TestHostStateDenied$", "-test.v")
	cmd.Env = append(os.Environ(), inside+"=1", "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Geteuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getegid(), Size: 1}},
	}
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		missing(t, err)
	}
	if err != nil || !strings.Contains(string(out), "--- PASS: TestHostStateDenied") {
		t.Errorf("inside: %v\n%s", err, out)
	}
}

// deniedInside is the test in its namespace, as root of it.
func deniedInside(t *testing.T) {
	const setup = `
ip link set lo up
ip address add 192.168.65.3/24 dev lo
ip address add fdc4:f303:9324::3/64 dev lo nodad
ip address add fdc4:f303:9324::2/64 dev lo nodad
nft add table inet t
nft 'add chain inet t in { type filter hook input priority 0; }'
nft add rule inet t in ip daddr 192.168.65.2 icmp type echo-request reject with icmp type admin-prohibited
nft add rule inet t in ip6 daddr fdc4:f303:9324::2 icmpv6 type echo-request reject with icmpv6 type admin-prohibited
`
	if out, err := exec.Command("sh", "-ec", setup).CombinedOutput(); err != nil {
		t.Fatalf("set up: %v\n%s", err, out)
	}
	// A new namespace has no ping sockets.
	for _, c := range []struct{ groups, kind string }{{"", "raw socket"}, {"0 0", "ping socket"}} {
		if c.groups != "" {
			if err := os.WriteFile("/proc/sys/net/ipv4/ping_group_range", []byte(c.groups), 0); err != nil {
				t.Fatal(err)
			}
		}
		if kind, err := ping(t.Context(), netip.MustParseAddr("192.168.65.3")); err != nil || kind != c.kind {
			t.Errorf("ping of itself by %s: %q, %v", c.kind, kind, err)
		}
		for _, a := range []string{"192.168.65.2", "fdc4:f303:9324::2"} {
			ctx, cancel := context.WithTimeout(t.Context(), checkLimit)
			detail, err := hostState(ctx, netip.MustParseAddr(a))
			cancel()
			if err != nil || !strings.HasPrefix(detail, "denied") {
				t.Errorf("host state of %s by %s: %q, %v", a, c.kind, detail, err)
			}
		}
	}
}
