package test

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/slipway-net/slipway/test/topo"
)

// The user's rules beside those of a real dockerd, and a big download: on dockerd's
// default bridge and on one that the user made, with both families.

// The ports that a user's rules are about: these from before dockerd, and ten more for
// the rules that come after it.
const (
	dropPort   = 7001
	resetPort  = 7002
	adminPort  = 7003
	freePort   = 7004
	laterPorts = 10
)

// userRules are shell commands that load a user's rules with a flavour of iptables.
func userRules(tables iptables, later int) string {
	var b strings.Builder
	for _, f := range families {
		command := tables.command(f) + " -w"
		rule := func(port int, target string) {
			fmt.Fprintf(&b, "%s -I DOCKER-USER -p tcp --dport %d -j %s\n", command, port+later, familyWords(f).Replace(target))
		}
		fmt.Fprintf(&b, "%s -N DOCKER-USER 2>/dev/null\n", command)
		rule(dropPort, "DROP")
		rule(resetPort, "REJECT --reject-with tcp-reset")
		rule(adminPort, "REJECT --reject-with {admin}")
		// dockerd 20.10 has the chain for IPv4 only.
		fmt.Fprintf(&b, "%[1]s -C FORWARD -j DOCKER-USER 2>/dev/null || %[1]s -I FORWARD -j DOCKER-USER\n", command)
	}
	return b.String()
}

// TestDockerUser: what DOCKER-USER says is done, whichever came first, with dockerd using
// either flavour of iptables. netstack has TestFirewall for that.
func TestDockerUser(t *testing.T) {
	for _, tables := range flavours {
		t.Run(string(tables), func(t *testing.T) { testDockerUser(t, "kernel", tables) })
	}
}

func testDockerUser(t *testing.T, path string, tables iptables) {
	n := newDockerWorld(t)
	need(t, tables.commands()...)
	for _, later := range []int{0, laterPorts} {
		for port := dropPort; port <= freePort; port++ {
			serveName(t, n.World, port+later)
		}
	}
	d := newDocker(t, path)
	d.before = usingTables(t, d.dir, tables) + userRules(tables, 0)
	d.start(t, n)
	d.build(t, "busybox:1")
	d.must(t, "network", "create", "--ipv6", "--subnet", "10.88.1.0/24", "--subnet", "fd00:d0d::/64", "dual")
	if _, err := d.engine.guest.Run("", "sh", "-c", userRules(tables, laterPorts)); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for _, network := range []string{"bridge", "dual"} {
		c := d.container(t, network, "busybox:1")
		for _, f := range families {
			for _, later := range []int{0, laterPorts} {
				wg.Go(func() { expectUserRules(t, network, c, f, later) })
			}
		}
	}
	wg.Wait()
}

// expectUserRules tries what the rules say to a container.
func expectUserRules(t *testing.T, network string, c *topo.NS, f family, later int) {
	for port, want := range map[int]string{dropPort: silence, resetPort: refused, adminPort: "{EADMIN}", freePort: "world"} {
		conn, said, err := greet(c, at(f.world, port+later), patience(want))
		if err != nil {
			said = inWords(err)
		} else {
			conn.Close()
		}
		if want = familyWords(f).Replace(want); said != want {
			t.Errorf("from a container on %s, %s, rules %d, port %d: %q, expected %q", network, f.name, later, port, said, want)
		}
	}
}

// usingTables has programs find the flavour as iptables.
func usingTables(t testing.TB, dir string, tables iptables) string {
	t.Helper()
	for _, f := range families {
		for _, end := range []string{"", "-save", "-restore"} {
			name := strings.TrimSuffix(tables.command(f), "-"+string(tables)) + end
			if err := os.MkdirAll(dir+"/bin", 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(lookPath(t, tables.command(f)+end), dir+"/bin/"+name); err != nil {
				t.Fatal(err)
			}
		}
	}
	return "export PATH=" + dir + "/bin:$PATH\n"
}

// container starts a container that waits, and returns its namespace.
func (d *docker) container(t *testing.T, network, image string) *topo.NS {
	t.Helper()
	id := d.must(t, "run", "-d", "-i", "--network", network, image, "cat")
	t.Cleanup(func() { d.must(t, "rm", "-f", id) })
	ns, err := topo.OpenNS("container on "+network, "/proc/"+d.must(t, "inspect", "-f", "{{.State.Pid}}", id)+"/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(ns.Close)
	return ns
}

// TestLongDockerDownload downloads 1 GiB; TestDocker less.
func TestLongDockerDownload(t *testing.T) {
	long(t)
	eachDockerPath(t, func(t *testing.T, path string) {
		d := startDocker(t, newDockerWorld(t), path)
		d.build(t, "busybox:1")
		d.download(t, "busybox:1", 1024)
	})
}

// download fetches a file in a container and compares its checksum, over IPv4 on the
// default bridge and over IPv6 on one with both.
func (d *docker) download(t *testing.T, image string, mebibytes int) {
	t.Helper()
	sum := sha256.New()
	bigStream(sum, mebibytes)
	want := hex.EncodeToString(sum.Sum(nil))
	d.must(t, "network", "create", "--ipv6", "--subnet", "10.88.2.0/24", "--subnet", "fd00:d0e::/64", "download")
	for network, address := range map[string]string{"bridge": topo.World4.String(), "download": "[" + topo.World6.String() + "]"} {
		script := fmt.Sprintf("/bin/busybox wget -q -O - http://%s/big/%d | /bin/busybox sha256sum", address, mebibytes)
		if got, _, _ := strings.Cut(d.must(t, "run", "--rm", "--network", network, image, "sh", "-c", script), " "); got != want {
			t.Errorf("%d MiB on %s: the checksum is %s, expected %s", mebibytes, network, got, want)
		}
	}
}

// bigPage serves /big/N, N MiB.
func bigPage(w http.ResponseWriter, r *http.Request) bool {
	var mebibytes int
	if _, err := fmt.Sscanf(r.URL.Path, "/big/%d", &mebibytes); err != nil {
		return false
	}
	bigStream(w, mebibytes)
	return true
}

// bigStream writes the page: blocks that no other block is like.
func bigStream(w io.Writer, mebibytes int) {
	block := pattern(1 << 20)
	for i := range mebibytes {
		binary.BigEndian.PutUint64(block, uint64(i))
		if _, err := w.Write(block); err != nil {
			return
		}
	}
}
