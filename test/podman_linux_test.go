package test

import (
	"archive/tar"
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/slipway-net/slipway/test/topo"
)

// A second engine, Debian's podman (4.3, netavark). It has no daemon: each command of it
// runs in the namespace. What was found out: with a --root, --runroot and --tmpdir of its
// own it still writes to /var/lib/containers/cache, to /dev/shm and to /run, and leaves
// the cgroup libpod_parent, with or without slipway.

// podman is a podman whose files are in dir.
type podman struct {
	engine *engine
	dir    string
	events string // where it keeps its events; nowhere if empty
}

const podmanImage = "localhost/busybox:1"

// TestPodman runs containers on the default bridge and on one with both families, over
// each path.
func TestPodman(t *testing.T) {
	need(t, "ip", "nft", "podman", "busybox", "/usr/lib/podman/netavark")
	if !isRoot() {
		missing(t, "root: netavark makes its own user namespace otherwise")
	}
	t.Cleanup(removePodmanCgroups)
	hide(t, "/dev/shm")
	hide(t, "/var/lib/containers")
	for _, k := range kinds {
		if k.native || k.rootless {
			continue
		}
		t.Run(k.name, func(t *testing.T) {
			n := newWebWorld(t)
			p := &podman{engine: startEngine(t, n, engineOptions{path: k.path}), dir: t.TempDir()}
			t.Cleanup(p.remove)
			p.makeImage(t)
			p.seesTheWorld(t, "podman", fmt.Sprintf("http://%v/", topo.World4), "http://www.example.test/")
			p.must(t, "network", "create", "--ipv6", "--disable-dns", "--subnet", "10.99.0.0/24", "--subnet", "fd00:99::/64", "dual")
			p.seesTheWorld(t, "dual", fmt.Sprintf("http://%v/", topo.World4), fmt.Sprintf("http://[%v]/", topo.World6))
			p.seenInFlows(t, k)
			p.alone(t, n, k)
		})
	}
}

// hide covers a folder of the machine until the test is over.
func hide(t testing.TB, dir string) {
	t.Helper()
	made := os.Mkdir(dir, 0o755) == nil
	mount(t, dir)
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
		if made {
			os.Remove(dir)
		}
	})
}

// removePodmanCgroups removes the empty cgroups that podman leaves.
func removePodmanCgroups() {
	for _, pattern := range []string{"/sys/fs/cgroup/*/libpod_parent", "/sys/fs/cgroup/libpod_parent"} {
		for _, below := range []string{"/*/*", "/*", ""} {
			dirs, _ := filepath.Glob(pattern + below)
			for _, d := range dirs {
				os.Remove(d)
			}
		}
	}
}

// command is a podman command line.
func (p *podman) command(args ...string) []string {
	return slices.Concat([]string{"podman", "--root", p.dir + "/root", "--runroot", p.dir + "/run", "--tmpdir", p.dir + "/tmp",
		"--cgroup-manager", "cgroupfs", "--events-backend", cmp.Or(p.events, "none"), "--network-config-dir", p.dir + "/networks"}, args)
}

// must runs podman in the engine and returns what it printed.
func (p *podman) must(t testing.TB, args ...string) string {
	t.Helper()
	r := p.engine.exec(t, p.command(args...)...)
	if r.code != 0 {
		t.Fatalf("podman %s: status %d: %s%s", strings.Join(args, " "), r.code, r.stdout, r.stderr)
	}
	return strings.TrimSpace(r.stdout)
}

// makeImage makes an image of Debian's static busybox.
func (p *podman) makeImage(t testing.TB) {
	t.Helper()
	p.must(t, "import", busyboxImage(t, p.dir), podmanImage)
}

// busyboxImage writes the files of an image with Debian's static busybox, for import.
func busyboxImage(t testing.TB, dir string) (file string) {
	t.Helper()
	busybox, err := os.ReadFile(lookPath(t, "busybox"))
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(dir + "/image.tar")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := tar.NewWriter(f)
	for _, dir := range []string{"bin/", "etc/", "tmp/"} {
		w.WriteHeader(&tar.Header{Name: dir, Typeflag: tar.TypeDir, Mode: 0o755})
	}
	w.WriteHeader(&tar.Header{Name: "bin/busybox", Typeflag: tar.TypeReg, Mode: 0o755, Size: int64(len(busybox))})
	w.Write(busybox)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

// seesTheWorld fetches pages from a container on a network.
func (p *podman) seesTheWorld(t testing.TB, network string, urls ...string) {
	t.Helper()
	for _, url := range urls {
		if page := p.must(t, "run", "--rm", "--network", network, podmanImage, "/bin/busybox", "wget", "-q", "-O", "-", url); page != "a page of the world" {
			t.Errorf("on %s, %s: the container sees %q", network, url, page)
		}
	}
}

// seenInFlows holds a container's connection: it is listed by the container's own
// address, although netavark masquerades, and takes the path.
func (p *podman) seenInFlows(t testing.TB, k kind) {
	t.Helper()
	id := p.must(t, "run", "-d", "-i", "--network", "podman", podmanImage, "/bin/busybox", "nc", topo.World4.String(), "7")
	address := p.must(t, "inspect", "-f", "{{.NetworkSettings.IPAddress}}", id)
	var all []flowDoc
	if !eventually(20*time.Second, func() bool {
		all = readFlows(t, p.engine)
		return slices.ContainsFunc(all, func(f flowDoc) bool {
			return f.Proto == "tcp" && f.Guest.Addr().String() == address && f.Target.Addr() == topo.World4 && f.Path == k.path
		})
	}) {
		t.Errorf("no flow of the container %s on the path %s in %v", address, k.path, all)
	}
	p.must(t, "rm", "-f", "-t", "0", id)
}

// alone runs a container without any engine that waits: podman is the command of run.
func (p *podman) alone(t testing.TB, n *topo.Topology, k kind) {
	t.Helper()
	args := slices.Concat([]string{"run", "--path", k.path, "--"},
		p.command("run", "--rm", podmanImage, "/bin/busybox", "wget", "-q", "-O", "-", fmt.Sprintf("http://%v/", topo.World4)))
	if r := finish(t, n.Host, user{}.slipway(args...), 30*time.Second); r.stdout != "a page of the world" {
		t.Errorf("slipway %s: %q, status %d: %s", strings.Join(args, " "), r.stdout, r.code, r.stderr)
	}
}

// remove removes what podman itself leaves.
func (p *podman) remove() {
	for _, dir := range []string{"/run/containers", "/run/libpod", "/run/crun", "/run/runc", "/run/lock/netavark.lock"} {
		os.RemoveAll(dir)
	}
}
