package nsagent

import (
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"
)

func init() {
	guestTests = append(guestTests,
		guestTest{"identity_snat", testIdentitySNAT},
		guestTest{"without_identity_snat", testWithoutIdentitySNAT},
	)
}

// A container as Docker makes it: behind a bridge whose traffic is masqueraded. The
// flush stands for an administrator; it comes before because it would remove the
// MASQUERADE as well.
const makeContainer = `
set -e
unshare -n sleep 1000 </dev/null >/dev/null 2>&1 &
echo $!
pid=$!
while [ "$(readlink /proc/$pid/ns/net)" = "$(readlink /proc/self/ns/net)" ]; do :; done
nft flush ruleset
echo 1 >/proc/sys/net/ipv4/ip_forward
echo 1 >/proc/sys/net/ipv6/conf/all/forwarding
ip link add v0 type veth peer name v1 netns $pid
ip addr add 172.17.0.1/16 dev v0
ip addr add fd00:17::1/64 dev v0 nodad
ip link set v0 up
nsenter -t $pid -n sh -c '
	ip addr add 172.17.0.2/16 dev v1
	ip addr add fd00:17::2/64 dev v1 nodad
	ip link set v1 up
	ip route add default via 172.17.0.1
	ip route add default via fd00:17::1'
iptables -t nat -A POSTROUTING -s 172.17.0.0/16 ! -o v0 -j MASQUERADE
ip6tables -t nat -A POSTROUTING -s fd00:17::/64 ! -o v0 -j MASQUERADE
`

// sources sends from a container and returns the addresses the packets arrive with.
func sources(t *testing.T, g *testGuest) (v4, v6 netip.Addr) {
	t.Helper()
	pid, _, _ := strings.Cut(g.sh(t, makeContainer), "\n")
	script := `for a in 198.51.100.7 2001:db8::7; do for i in 1 2 3 4 5; do echo x >/dev/udp/$a/4000; done; done`
	p, err := g.Exec(t.Context(), Command{
		Args: []string{"nsenter", "-t", pid, "-n", "bash", "-c", script}, Env: os.Environ(), Stderr: os.Stderr,
	})
	if err != nil {
		t.Fatal(err)
	}
	if st, err := p.Wait(); err != nil || st.Code != 0 {
		t.Fatalf("status %+v, error %v", st, err)
	}
	const header = 10 // virtio-net
	buf := make([]byte, 4096)
	g.TUN().SetReadDeadline(time.Now().Add(10 * time.Second))
	for !v4.IsValid() || !v6.IsValid() {
		n, err := g.TUN().Read(buf)
		if err != nil {
			t.Fatalf("waiting for %v, %v: %v", v4, v6, err)
		}
		p := buf[header:n]
		switch {
		case len(p) > 28 && p[0]>>4 == 4 && p[9] == 17:
			v4 = netip.AddrFrom4([4]byte(p[12:16]))
		case len(p) > 48 && p[0]>>4 == 6 && p[6] == 17:
			v6 = netip.AddrFrom16([16]byte(p[8:24]))
		}
	}
	return v4, v6
}

func testIdentitySNAT(t *testing.T) {
	g := start(t, testSpec(t))
	if g.Report().SNAT != "" {
		missing(t, "identity SNAT: %s", g.Report().SNAT)
	}
	v4, v6 := sources(t, g)
	if got, want := fmt.Sprint(v4, v6), "172.17.0.2 fd00:17::2"; got != want {
		t.Errorf("a container appears as %s, want %s", got, want)
	}
	tables := g.sh(t, "nft list ruleset")
	if strings.Count(tables, "flags owner") != 2 {
		t.Errorf("our tables are not owned:\n%s", tables)
	}
}

// The test above would pass with rules that do not masquerade; this one would not.
func testWithoutIdentitySNAT(t *testing.T) {
	spec := testSpec(t)
	spec.IdentitySNAT = false
	v4, v6 := sources(t, start(t, spec))
	if got, want := fmt.Sprint(v4, v6), "192.168.65.3 fdc4:f303:9324::3"; got != want {
		t.Errorf("a container appears as %s, want %s", got, want)
	}
}
