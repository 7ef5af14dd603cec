package test

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/slipway-net/slipway/test/topo"
)

// Real engines: Debian's dockerd (docker.io 20.10) inside slipway, a real registry
// in world. What was found out about dockerd started by hand, without systemd, on
// a machine with cgroup v1 and v2 mounted side by side:
//
//   - it runs in any net and mount namespace where /sys/fs/cgroup stays what it
//     is; where a fresh sysfs hides the cgroups it starts too, but without limits,
//     and newer ones refuse;
//   - overlay2 on ext4 and iptables-nft work without a flag; containerd is started
//     by dockerd itself, below --exec-root;
//   - two of them need their own --config-file, --data-root, --exec-root, --pidfile
//     and -H, and nothing else; --config-file must exist and hold JSON;
//   - it leaves /run/docker/plugins, /run/containerd and the cgroup "docker" behind,
//     with or without slipway.

const registryName = "registry.example.test:5000"

// TestDocker builds, pushes, deletes, pulls and runs an image, and looks at the
// world from its container.
func TestDocker(t *testing.T) {
	eachDockerPath(t, func(t *testing.T, path string) { testDocker(t, path) })
}

// eachDockerPath runs a suite over each path.
func eachDockerPath(t *testing.T, suite func(t *testing.T, path string)) {
	t.Helper()
	for _, path := range []string{"netstack", "kernel"} {
		t.Run(path, func(t *testing.T) { suite(t, path) })
	}
}

func testDocker(t *testing.T, path string) {
	n := newDockerWorld(t)
	d := startDocker(t, n, path)
	rules := ruleset(t, n.Host)
	d.wholeRound(t)
	d.download(t, d.image(), 64)
	if now := ruleset(t, n.Host); now != rules {
		t.Errorf("the host's rules were\n%s\nand are\n%s", rules, now)
	}
}

// TestTwoDockers: two engines at the same time with the same bridge addresses, on a
// host that forwards nothing and drops what would be forwarded.
func TestTwoDockers(t *testing.T) {
	n := newDockerWorld(t)
	for _, name := range []string{"net.ipv4.conf.all.rp_filter", "net.ipv4.conf.default.rp_filter", "net.ipv4.conf.host0.rp_filter"} {
		if err := n.Host.Sysctl(name, "1"); err != nil {
			t.Fatal(err)
		}
	}
	if err := n.Host.NFT(`table inet hostile {
		chain forward {
			type filter hook forward priority filter; policy drop;
		}
		chain input {
			type filter hook input priority filter; policy drop;
			iif lo accept
			ct state established,related accept
			meta l4proto ipv6-icmp accept
		}
	}`); err != nil {
		t.Fatal(err)
	}
	rules := ruleset(t, n.Host)
	a, b := startDocker(t, n, "kernel"), startDocker(t, n, "netstack")
	var wg sync.WaitGroup
	for _, d := range []*docker{a, b} {
		wg.Go(func() { d.wholeRound(t) })
	}
	wg.Wait()
	// Each has its own rules: what one does inside is not seen in the other.
	if err := a.engine.guest.NFT("table inet only-here {}"); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(ruleset(t, b.engine.guest), "only-here") || !strings.Contains(ruleset(t, b.engine.guest), "DOCKER") {
		t.Error("the second engine has not its own rules")
	}
	if now := ruleset(t, n.Host); now != rules {
		t.Errorf("the host's rules were\n%s\nand are\n%s", rules, now)
	}
	if on, _ := n.Host.Run("", "sysctl", "-n", "net.ipv4.ip_forward"); strings.TrimSpace(on) != "0" {
		t.Error("an engine turned forwarding on in the host's namespace")
	}
}

// newDockerWorld is a topology with name server, registry and web server.
func newDockerWorld(t *testing.T) *topo.Topology {
	t.Helper()
	need(t, "dockerd", "docker", "containerd", "docker-registry", "iptables", "busybox")
	if !isRoot() {
		missing(t, "root: dockerd of Debian does not run otherwise")
	}
	for _, dir := range []string{"/run/docker/plugins", "/run/containerd/s"} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(removeDockerCgroups)
	n := newWebWorld(t)
	startRegistry(t, n)
	return n
}

// newWebWorld is a topology with name server, web server and echo.
func newWebWorld(t *testing.T) *topo.Topology {
	t.Helper()
	n := newTopology(t)
	startNameServer(t, n.World)
	for _, f := range families {
		l, err := n.World.Listen(at(f.world, 80))
		if err != nil {
			t.Fatal(err)
		}
		web := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if !bigPage(w, r) {
				io.WriteString(w, "a page of the world")
			}
		})}
		group := newGroup(t, web)
		group.Go(func() { web.Serve(l) })
		serve(t, n.World, at(f.world, 7), func(c *net.TCPConn) {
			defer c.Close()
			io.Copy(c, c)
		})
	}
	return n
}

// removeDockerCgroups removes the empty cgroups that dockerd leaves.
func removeDockerCgroups() {
	dirs, _ := filepath.Glob("/sys/fs/cgroup/*/docker")
	for _, d := range append(dirs, "/sys/fs/cgroup/docker") {
		os.Remove(d)
	}
}

func startRegistry(t *testing.T, n *topo.Topology) {
	t.Helper()
	dir := t.TempDir()
	config := fmt.Sprintf("version: 0.1\nlog: {level: warn}\nstorage: {filesystem: {rootdirectory: %s}, delete: {enabled: true}}\nhttp: {addr: '%s'}\n",
		dir, at(topo.Other4, 5000))
	if err := os.WriteFile(dir+"/config.yml", []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(lookPath(t, "docker-registry"), "serve", dir+"/config.yml")
	var out log
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := n.World.Start(cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	if !eventually(30*time.Second, func() bool { return dialError(n.Host, at(topo.Other4, 5000), time.Second) == "ok" }) {
		t.Fatalf("the registry does not listen:\n%s", out.String())
	}
}

// docker is a dockerd inside slipway.
type docker struct {
	engine *engine
	dir    string
	sock   string // of dockerd; dir/sock if empty
	client string
	path   string // of its traffic
	before string // a script that runs in the namespace before dockerd

	starter func(*exec.Cmd) *exec.Cmd // who starts `slipway up`; nil for the test itself
}

// startDocker starts the engine as docs/docker.md says.
func startDocker(t *testing.T, n *topo.Topology, path string) *docker {
	t.Helper()
	d := newDocker(t, path)
	d.start(t, n)
	return d
}

// newDocker makes the files of an engine.
func newDocker(t *testing.T, path string) *docker {
	t.Helper()
	dir, err := os.MkdirTemp("", "slipway-docker-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("a mount is left: %v", err)
		}
	})
	config := map[string]any{
		"insecure-registries": []string{registryName},
		"ipv6":                true,
		"fixed-cidr-v6":       "fd00:d0c::/64",
	}
	text, _ := json.Marshal(config)
	if err := os.WriteFile(dir+"/daemon.json", text, 0o644); err != nil {
		t.Fatal(err)
	}
	d := &docker{dir: dir, client: lookPath(t, "docker"), path: path}
	if _, err := os.Stat("/usr/bin/docker"); err == nil {
		d.client = "/usr/bin/docker" // Debian's, where there is another too
	}
	return d
}

func (d *docker) start(t *testing.T, n *topo.Topology) {
	t.Helper()
	e := &engine{name: newName(), net: n, done: make(chan struct{})}
	e.before = snapshot(t, n)
	e.cmd = e.slipway("run", "--name", e.name, "--path", d.path, "--", "sh", "-c", d.before+`exec "$@"`, "sh",
		"dockerd", "--data-root", d.dir+"/data", "--exec-root", d.dir+"/exec",
		"--pidfile", d.dir+"/pid", "-H", "unix://"+d.dir+"/sock", "--config-file", d.dir+"/daemon.json")
	stdin, out := e.begin(t)
	e.stdin = stdin
	go io.Copy(io.Discard, out)
	d.engine = e
	t.Cleanup(func() { d.stop(t) })
	if !eventually(90*time.Second, func() bool {
		select {
		case <-e.done:
			t.Fatalf("dockerd ended: %s", tail(e.stderr.String(), 4<<10))
		default:
		}
		_, err := os.Stat(d.dir + "/sock")
		return err == nil && d.run(context.Background(), "version") == nil
	}) {
		t.Fatalf("dockerd is not ready after 90 s: %s", tail(e.stderr.String(), 4<<10))
	}
	text, err := os.ReadFile(d.dir + "/pid")
	if err != nil {
		t.Fatal(err)
	}
	if e.guest, err = topo.OpenNS("guest "+e.name, "/proc/"+strings.TrimSpace(string(text))+"/ns/net"); err != nil {
		t.Fatal(err)
	}
	if e.capture, err = topo.StartCapture(e.guest, "slipway0"); err != nil {
		t.Fatal(err)
	}
}

// stop ends the engine as a service manager does and looks for leftovers.
func (d *docker) stop(t *testing.T) {
	d.engine.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-d.engine.done:
		if code := status(d.engine.state); code != 0 {
			t.Errorf("dockerd ended with status %d: %s", code, tail(d.engine.stderr.String(), 4<<10))
		}
	case <-time.After(60 * time.Second):
		t.Error("dockerd did not end within 60 s of TERM")
	}
	// What dockerd itself leaves; on a slow machine it asks containerd for its stacks.
	removeDockerCgroups()
	stacks, _ := filepath.Glob(runTmp + "/containerd.*.stacks.log")
	for _, f := range stacks {
		os.Remove(f)
	}
	if d.engine.rootless {
		os.RemoveAll(filepath.Dir(d.engine.stateDir()) + "/runc")
	}
	d.engine.end(t)
}

// command is the docker client for this engine.
func (d *docker) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, d.client, args...)
	cmd.Env = d.environment()
	return cmd
}

// environment is for docker's clients.
func (d *docker) environment() []string {
	return []string{"PATH=" + os.Getenv("PATH"), "HOME=" + d.dir, "DOCKER_HOST=unix://" + cmp.Or(d.sock, d.dir+"/sock"), "DOCKER_BUILDKIT=0"}
}

func (d *docker) run(ctx context.Context, args ...string) error { return d.command(ctx, args...).Run() }

// must runs the client and returns what it printed; a failure is the test's.
func (d *docker) must(t *testing.T, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 180*time.Second)
	defer cancel()
	out, err := d.command(ctx, args...).CombinedOutput()
	if err != nil {
		t.Errorf("docker %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// wholeRound is the life of an image and what its containers see. Two engines in
// the same test push under names of their own.
func (d *docker) wholeRound(t *testing.T) {
	image := d.image()
	d.build(t, image)
	d.must(t, "push", image)
	d.must(t, "rmi", image)
	if out := d.must(t, "images", "-q"); out != "" {
		t.Errorf("images after the deletion: %s", out)
	}
	d.must(t, "pull", image)
	for _, url := range []string{"http://www.example.test/", fmt.Sprintf("http://%v/", topo.World4), fmt.Sprintf("http://[%v]/", topo.World6)} {
		if page := d.must(t, "run", "--rm", image, "wget", "-q", "-O", "-", url); page != "a page of the world" {
			t.Errorf("%s: the container sees %q", url, page)
		}
	}
	d.seenInFlows(t, image)
}

func (d *docker) image() string { return registryName + "/" + d.engine.name + ":1" }

// build makes an image FROM scratch with Debian's static busybox.
func (d *docker) build(t *testing.T, image string) {
	t.Helper()
	dir := d.dir + "/image"
	busybox, err := os.ReadFile(lookPath(t, "busybox"))
	if err == nil {
		err = os.MkdirAll(dir, 0o755)
	}
	if err == nil {
		err = os.WriteFile(dir+"/busybox", busybox, 0o755)
	}
	if err == nil {
		err = os.WriteFile(dir+"/Dockerfile", []byte("FROM scratch\nCOPY busybox /bin/busybox\nENTRYPOINT [\"/bin/busybox\"]\n"), 0o644)
	}
	if err != nil {
		t.Error(err)
		return
	}
	d.must(t, "build", "-q", "-t", image, dir)
}

// seenInFlows holds a connection from each of two containers: flows lists both,
// by their own addresses, although dockerd masquerades.
func (d *docker) seenInFlows(t *testing.T, image string) {
	var ids []string
	for range 2 {
		// The pipe keeps nc's input open.
		ids = append(ids, d.must(t, "run", "-d", "-i", image, "nc", topo.World4.String(), "7"))
	}
	for _, id := range ids {
		address := d.must(t, "inspect", "-f", "{{.NetworkSettings.IPAddress}}", id)
		var all []flowDoc
		if !eventually(20*time.Second, func() bool {
			all = readFlows(t, d.engine)
			for _, f := range all {
				if f.Proto == "tcp" && f.Guest.Addr().String() == address && f.Target.Addr() == topo.World4 && f.Path == d.path {
					return true
				}
			}
			return false
		}) {
			t.Errorf("no flow of the container %s on the path %s in %v", address, d.path, all)
		}
	}
	d.must(t, append([]string{"rm", "-f"}, ids...)...)
}
