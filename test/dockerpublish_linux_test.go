package test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/slipway-net/slipway/test/topo"
	"golang.org/x/sys/unix"
)

// Ports that dockerd publishes, with a real dockerd of Debian (20.10) and a current one
// that test/dockerd.sh builds: after everything that can happen to a container, to dockerd
// and to slipway the host listens on exactly what runs.

// dockerdKind is a dockerd to be tested.
type dockerdKind struct {
	name    string
	program string
	options []string
}

// newestDockerd is what test/dockerd.sh has built.
func newestDockerd(t testing.TB) string {
	t.Helper()
	cache, err := os.UserCacheDir()
	if err != nil {
		missing(t, "a current dockerd: %v", err)
	}
	all, _ := filepath.Glob(cache + "/slipway-test/dockerd-*/dockerd")
	if len(all) == 0 {
		missing(t, "a current dockerd, which test/dockerd.sh builds")
	}
	return slices.Max(all)
}

// eachDockerd runs the suite with both.
func eachDockerd(t *testing.T, suite func(t *testing.T, k dockerdKind)) {
	t.Helper()
	t.Run("20.10", func(t *testing.T) { suite(t, dockerdKind{name: "20.10", program: lookPath(t, "dockerd")}) })
	t.Run("current", func(t *testing.T) {
		// Debian's runc is too old for a namespace that it asks for otherwise.
		suite(t, dockerdKind{"current", newestDockerd(t), []string{"--feature", "time-namespaces=false"}})
	})
}

// needDockerd is need for tests with a dockerd that get along without a registry.
func needDockerd(t testing.TB) {
	t.Helper()
	needPublish(t, "dockerd", "docker", "containerd", "iptables", "busybox")
	if !isRoot() {
		missing(t, "root: dockerd of Debian does not run otherwise")
	}
	for _, dir := range []string{"/run/docker/plugins", "/run/containerd/s"} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(removeDockerCgroups)
}

// dockerImage is of Debian's static busybox.
const dockerImage = "busybox:1"

// newUpDocker makes the files of an engine with kind = "dockerd". Its data is on disk, in
// place of the machine's /var/lib/slipway.
func newUpDocker(t *testing.T, k dockerdKind, settings string) *docker {
	t.Helper()
	d := newDocker(t, "")
	d.engine = &engine{name: newName()}
	const data = "/var/lib/slipway"
	made := os.Mkdir(data, 0o755) == nil
	if err := os.Mkdir(d.dir+"/var", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(d.dir+"/var", data, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(data, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
		if made {
			os.Remove(data)
		}
	})
	words := append([]string{k.program}, k.options...)
	for i, w := range words {
		words[i] = strconv.Quote(w)
	}
	// Clients of Debian speak an API that a current dockerd knows when it is told to.
	text := fmt.Sprintf("%s\n[engine.%s]\nkind = \"dockerd\"\ncommand = [%s]\nenvironment = { DOCKER_MIN_API_VERSION = \"1.24\" }\n",
		settings, d.engine.name, strings.Join(words, ", "))
	if err := os.WriteFile(d.dir+"/slipway.toml", []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return d
}

// up starts `slipway up` and waits for its dockerd. After end it may be started again.
func (d *docker) up(t *testing.T, n *topo.Topology) {
	t.Helper()
	e := &engine{user: d.engine.user, name: d.engine.name, net: n, done: make(chan struct{})}
	e.before = snapshot(t, n)
	e.cmd = e.slipway("up", "--config", d.dir+"/slipway.toml", e.name)
	if d.starter != nil {
		e.cmd = d.starter(e.cmd)
	}
	stdin, out := e.begin(t)
	e.stdin = stdin
	go io.Copy(io.Discard, out)
	d.engine, d.sock = e, e.sock("docker.sock")
	t.Cleanup(func() {
		if !e.ended {
			d.stop(t)
		}
	})
	if !eventually(90*time.Second, func() bool {
		select {
		case <-e.done:
			t.Fatalf("slipway up ended: %s", tail(e.stderr.String(), 4<<10))
		default:
		}
		_, err := os.Stat(d.sock)
		return err == nil && d.run(context.Background(), "version") == nil
	}) {
		t.Fatalf("dockerd is not ready after 90 s: %s", tail(e.stderr.String(), 4<<10))
	}
	var inode uint64
	if r := e.exec(t, "readlink", "/proc/self/ns/net"); r.code != 0 {
		t.Fatalf("exec: %s", r.stderr)
	} else if _, err := fmt.Sscanf(r.stdout, "net:[%d]", &inode); err != nil {
		t.Fatal(err)
	}
	e.enter(t, inode)
}

// runImage starts a container that does nothing, and returns its id.
func (d *docker) runImage(t *testing.T, options ...string) string {
	t.Helper()
	return d.must(t, slices.Concat([]string{"run", "-d", "--stop-signal", "KILL"}, options, []string{dockerImage, "/bin/busybox", "sleep", "1000000"})...)
}

// inside serves tellSource's port in a container.
func (d *docker) inside(t *testing.T, id string) {
	t.Helper()
	ns, err := topo.OpenNS("container "+id, "/proc/"+d.pid(t, id)+"/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(ns.Close)
	tellSource(t, ns, containerPort)
}

// pid is that of a container's process, once it runs.
func (d *docker) pid(t *testing.T, id string) (pid string) {
	t.Helper()
	if !eventually(30*time.Second, func() bool {
		pid = d.must(t, "inspect", "-f", "{{.State.Pid}}", id)
		return pid != "0"
	}) {
		t.Fatalf("container %s does not run", id)
	}
	return pid
}

// kill ends a container's process as its own crash would.
func (d *docker) kill(t *testing.T, id string) {
	t.Helper()
	pid, err := strconv.Atoi(d.pid(t, id))
	if err != nil || pid < 2 {
		t.Fatalf("container %s has pid %d: %v", id, pid, err)
	}
	unix.Kill(pid, unix.SIGKILL)
}

// TestPublishDockerNoProxy: a dockerd whose options turn its proxy off is watched instead.
func TestPublishDockerNoProxy(t *testing.T) {
	needDockerd(t)
	eachDockerd(t, func(t *testing.T, k dockerdKind) {
		n := newTopology(t)
		k.options = append(slices.Clone(k.options), "--userland-proxy=false")
		d := newUpDocker(t, k, "")
		d.up(t, n)
		d.must(t, "import", busyboxImage(t, d.dir), dockerImage)
		c := d.runImage(t, "-p", "127.0.0.1:18080:80", "-p", topo.Host4.String()+":18081:80")
		expectListeners(t, n, "docker run", []string{"tcp 127.0.0.1:18080", "tcp " + topo.Host4.String() + ":18081"})
		d.inside(t, c)
		d.must(t, "rm", "-f", c)
		expectListeners(t, n, "docker rm")
	})
}

// TestPublishDocker is the life of published containers.
func TestPublishDocker(t *testing.T) {
	needDockerd(t)
	eachDockerd(t, func(t *testing.T, k dockerdKind) {
		n := newTopology(t)
		d := newUpDocker(t, k, "")
		d.up(t, n)
		d.expectCommand(t, k)
		d.must(t, "import", busyboxImage(t, d.dir), dockerImage)
		expectListeners(t, n, "no container")

		host := topo.Host4.String()
		plain := d.runImage(t, "-p", "18080:80", "-p", "18080:80/udp", "-p", "127.0.0.1:18081:80", "-p", host+":18082:80", "-p", host+":18082:80/udp")
		ofPlain := [][]string{onAll("tcp", 18080), onAll("udp", 18080), {"tcp 127.0.0.1:18081", "tcp " + host + ":18082", "udp " + host + ":18082"}}
		expectListeners(t, n, "docker run", ofPlain...)
		d.expectNames(t, plain)
		d.inside(t, plain)
		d.expectSources(t, n)
		if k.name == "current" { // 20.10 has no rules for IPv6 unless it is told to
			d.expectSources6(t, n)
			expectListeners(t, n, "docker rm of a container with IPv6", ofPlain...)
		}
		d.conflict(t, n, ofPlain)
		d.conflictInside(t, k)

		always := d.runImage(t, "--restart", "always", "-p", "18083:80")
		ofAlways := onAll("tcp", 18083)
		expectListeners(t, n, "a second container", append(ofPlain, ofAlways)...)
		d.must(t, "stop", plain)
		expectListeners(t, n, "docker stop", ofAlways)
		d.must(t, "start", plain)
		expectListeners(t, n, "docker start", append(ofPlain, ofAlways)...)
		d.must(t, "rename", plain, "renamed")
		d.must(t, "pause", plain)
		d.must(t, "unpause", plain)
		expectListeners(t, n, "rename and pause", append(ofPlain, ofAlways)...)
		d.kill(t, plain)
		expectListeners(t, n, "kill -9 of a container", ofAlways)
		d.kill(t, always)
		if !eventually(20*time.Second, func() bool { return d.must(t, "inspect", "-f", "{{.RestartCount}}", always) == "1" }) {
			t.Error("the container was not started again")
		}
		expectListeners(t, n, "kill -9 of a container that is started again", ofAlways)
		d.inside(t, always)
		reach(t, n, "tcp", 18083)

		// slipway has no engine without its dockerd.
		if pid := d.dockerd(t); pid > 0 {
			unix.Kill(pid, unix.SIGKILL)
		}
		select {
		case <-d.engine.done:
		case <-time.After(60 * time.Second):
			t.Fatal("slipway does not end within 60 s of a killed dockerd")
		}
		expectListeners(t, n, "kill -9 of dockerd")
		d.over(t)
		d.up(t, n)
		expectListeners(t, n, "started again after kill -9 of dockerd", ofAlways)
		d.inside(t, always)
		reach(t, n, "tcp", 18083)
		if k.name == "current" {
			before := d.engine.before
			d.engine.cmd.Process.Kill()
			<-d.engine.done
			expectListeners(t, n, "slipway was killed")
			d.over(t)
			d.up(t, n)
			d.engine.before = before // the next start clears what a killed daemon left
		} else {
			d.stop(t)
			expectListeners(t, n, "slipway stopped")
			d.up(t, n)
		}
		expectListeners(t, n, "slipway started again", ofAlways)
		d.must(t, "rm", "-f", plain, always)
		expectListeners(t, n, "docker rm")
	})
}

// expectCommand: what is shown as the engine's command is its dockerd, whose plugins are its own.
func (d *docker) expectCommand(t *testing.T, k dockerdKind) {
	t.Helper()
	if r := d.engine.call(t, "ls"); r.code != 0 || !strings.Contains(r.stdout, "  "+k.program+" --config-file ") {
		t.Errorf("slipway ls: %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	const name = "/run/docker/plugins/of-one-engine"
	if r := d.engine.exec(t, "touch", name); r.code != 0 {
		t.Errorf("a file among dockerd's plugins: %s", r.stderr)
	}
	if _, err := os.Stat(name); !errors.Is(err, fs.ErrNotExist) {
		os.Remove(name)
		t.Errorf("plugins of the engine are the host's: %v", err)
	}
}

// expectNames: a container's ports have its name, and what is reached of a specific one is it.
func (d *docker) expectNames(t *testing.T, id string) {
	t.Helper()
	name := strings.TrimPrefix(d.must(t, "inspect", "-f", "{{.Name}}", id), "/")
	address := d.must(t, "inspect", "-f", "{{.NetworkSettings.IPAddress}}", id)
	r := d.engine.call(t, "ports", "ls", d.engine.name)
	for _, want := range []string{
		"192.168.65.3:18080 (" + address + ":80)  preserve  docker: " + name + "  ", address + ":80  ", "preserve  docker: " + name + "  ",
	} {
		if !strings.Contains(r.stdout, want) {
			t.Errorf("ports ls has no %q: status %d\n%s%s", want, r.code, r.stdout, r.stderr)
		}
	}
	if strings.Contains(r.stdout, "guest (") {
		t.Errorf("ports ls knows no container:\n%s", r.stdout)
	}
	if r := d.engine.call(t, "ports", "add", d.engine.name, "18080:81"); r.code != 125 || !strings.Contains(r.stderr, "port 18080 is taken by container "+name+" of engine "+d.engine.name) {
		t.Errorf("a container's port: status %d, %s", r.code, r.stderr)
	}
	// A dockerd that hangs does not make the listing hang.
	if pid := d.dockerd(t); pid > 0 {
		unix.Kill(pid, unix.SIGSTOP)
		defer unix.Kill(pid, unix.SIGCONT)
		time.Sleep(1100 * time.Millisecond) // what was asked for just now is asked again
		from := time.Now()
		r := d.engine.call(t, "ports", "ls", d.engine.name)
		if r.code != 0 || !strings.Contains(r.stdout, "docker: "+name) || time.Since(from) > 15*time.Second {
			t.Errorf("with a stopped dockerd: status %d after %v\n%s%s", r.code, time.Since(from), r.stdout, r.stderr)
		}
	}
}

// dockerd is the pid of the engine's dockerd.
func (d *docker) dockerd(t testing.TB) int {
	t.Helper()
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		cmdline, _ := os.ReadFile(dir + "/cmdline")
		program, _, _ := strings.Cut(string(cmdline), "\x00")
		if filepath.Base(program) == "dockerd" && strings.Contains(string(cmdline), d.sock) {
			pid, _ := strconv.Atoi(filepath.Base(dir))
			return pid
		}
	}
	t.Errorf("no dockerd for %s", d.sock)
	return 0
}

// over forgets an engine that ended by itself. Its processes ended with it; what files
// and mounts dockerd leaves when it is killed is its own affair.
func (d *docker) over(t testing.TB) {
	t.Helper()
	var left []string
	if !eventually(40*time.Second, func() bool { // stop_timeout and more
		left = nil
		now := make(leftovers)
		now.processes()
		for _, name := range d.engine.before.missingFrom(now) {
			if strings.HasPrefix(name, "process ") && !strings.HasSuffix(name, ": ") { // not of a zombie
				left = append(left, name)
			}
		}
		return len(left) == 0
	}) {
		t.Errorf("processes are left of an engine whose dockerd was killed:\n\t%s", strings.Join(left, "\n\t"))
	}
	d.engine.ended = true
	d.engine.capture.Close()
	d.engine.guest.Close()
	d.engine.stdin.Close()
}

// expectSources asks the ports of TestPublishDocker's first container: an IPv4 one.
func (d *docker) expectSources(t *testing.T, n *topo.Topology) {
	t.Helper()
	loopback, own, other := clientsOf(n, families[0])
	_, own6, other6 := clientsOf(n, families[1])
	for _, tt := range []struct {
		client client
		to     netip.Addr
		port   uint16
		protos string
		want   string
	}{
		{loopback, loopback.from, 18080, "tcp udp", "gateway"},
		{own, topo.Host4, 18080, "tcp udp", "client"},
		{other, topo.Host4, 18080, "tcp udp", "client"},
		{own6, topo.Host6, 18080, "tcp udp", "gateway"},
		{other6, topo.Host6, 18080, "tcp udp", "gateway"},
		{loopback, loopback.from, 18081, "tcp", "gateway"},
		{own, topo.Host4, 18082, "tcp udp", "client"},
		{other, topo.Host4, 18082, "tcp udp", "client"},
	} {
		for _, proto := range strings.Fields(tt.protos) {
			s, err := tt.client.ask(proto, netip.AddrPortFrom(tt.to, tt.port))
			if problem := s.differs(tt.want, families[0]); err != nil || problem != "" {
				t.Errorf("%d/%s, from %v: %s %v", tt.port, proto, tt.client.from, problem, err)
			}
		}
	}
}

// expectSources6 asks a container that has IPv6: its clients keep their addresses there, too.
func (d *docker) expectSources6(t *testing.T, n *topo.Topology) {
	t.Helper()
	host := inBrackets(topo.Host6)
	d.must(t, "network", "create", "--ipv6", "--subnet", "10.88.1.0/24", "--subnet", "fd00:d0d::/64", "dual")
	id := d.runImage(t, "--network", "dual", "-p", "18084:80", "-p", "18084:80/udp", "-p", host+":18085:80", "-p", host+":18085:80/udp", "-p", "[::1]:18086:80")
	d.inside(t, id)
	loopback, own, other := clientsOf(n, families[1])
	_, _, other4 := clientsOf(n, families[0])
	for _, tt := range []struct {
		client client
		to     netip.Addr
		port   uint16
		protos string
		want   string
		family family
	}{
		{loopback, loopback.from, 18084, "tcp udp", "gateway", families[1]},
		{own, topo.Host6, 18084, "tcp udp", "client", families[1]},
		{other, topo.Host6, 18084, "tcp udp", "client", families[1]},
		{other4, topo.Host4, 18084, "tcp udp", "client", families[0]},
		{own, topo.Host6, 18085, "tcp udp", "client", families[1]},
		{other, topo.Host6, 18085, "tcp udp", "client", families[1]},
		{loopback, loopback.from, 18086, "tcp", "gateway", families[1]},
	} {
		for _, proto := range strings.Fields(tt.protos) {
			s, err := tt.client.ask(proto, netip.AddrPortFrom(tt.to, tt.port))
			if problem := s.differs(tt.want, tt.family); err != nil || problem != "" {
				t.Errorf("with IPv6: %d/%s, from %v: %s %v", tt.port, proto, tt.client.from, problem, err)
			}
		}
	}
	d.must(t, "rm", "-f", id)
}

// conflict asks for a port that a process of the host has: docker run fails with our
// message and nothing is left of it.
func (d *docker) conflict(t *testing.T, n *topo.Topology, before [][]string) {
	t.Helper()
	l, err := listenOnly(n.Host, netip.MustParseAddrPort("0.0.0.0:18090"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	want := fmt.Sprintf("port 18090 is taken by %s (pid %d)", comm(), os.Getpid())
	if d.engine.rootless {
		want = "port 18090 is taken by a process of root"
	}
	for try := 1; ; try++ { // on a busy machine the search for who has it is given up
		ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
		out, err := d.command(ctx, "run", "--name", "unlucky", "-p", "18089:80", "-p", "18090:80", dockerImage, "/bin/busybox", "true").CombinedOutput()
		cancel()
		d.must(t, "rm", "-f", "unlucky")
		if err != nil && strings.Contains(string(out), want) {
			break
		}
		if err == nil || try == 5 || !strings.Contains(string(out), "port 18090 is taken") {
			t.Errorf("docker run with a port that is taken: %v, expected %q:\n%s", err, want, out)
			break
		}
	}
	expectListeners(t, n, "after a conflict", append(before, []string{"tcp 0.0.0.0:18090"})...)
}

// conflictInside asks for a port that a container on the engine's own network has. Before Docker 28
// it is our proxy that cannot listen, and says who has it; later dockerd, which does not.
func (d *docker) conflictInside(t *testing.T, k dockerdKind) {
	t.Helper()
	id := d.must(t, "run", "-d", "--network", "host", "--stop-signal", "KILL", dockerImage, "/bin/busybox", "httpd", "-f", "-p", "18090")
	defer d.must(t, "rm", "-f", id)
	want := "port 18090 is taken by busybox (pid " + d.pid(t, id) + ")"
	if k.name == "current" {
		want = "failed to bind host port 0.0.0.0:18090/tcp: address already in use"
	}
	var out []byte
	if !eventually(20*time.Second, func() (told bool) { // until the server listens, and the search is not given up
		ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
		defer cancel()
		var err error
		out, err = d.command(ctx, "run", "--rm", "-p", "18090:80", dockerImage, "/bin/busybox", "true").CombinedOutput()
		return err != nil && strings.Contains(string(out), want)
	}) {
		t.Errorf("docker run with a port that is taken inside: expected %q:\n%s", want, out)
	}
}

// comm is our own name as the kernel has it.
func comm() string {
	text, _ := os.ReadFile("/proc/self/comm")
	return strings.TrimSpace(string(text))
}

// TestPublishCompose: a file with three services, each published in another way.
func TestPublishCompose(t *testing.T) {
	needDockerd(t)
	need(t, "docker-compose")
	n := newTopology(t)
	d := newUpDocker(t, dockerdKind{name: "20.10", program: lookPath(t, "dockerd")}, "")
	d.up(t, n)
	d.must(t, "import", busyboxImage(t, d.dir), dockerImage)
	const services = `
version: "3"
services:
  web:
    image: busybox:1
    command: ["/bin/busybox", "httpd", "-f", "-p", "80", "-h", "/etc"]
    stop_signal: KILL
    ports: ["18080:80", "127.0.0.1:18443:80"]
  name:
    image: busybox:1
    command: ["/bin/busybox", "sleep", "1000000"]
    stop_signal: KILL
    ports: ["18053:53/udp"]
  many:
    image: busybox:1
    command: ["/bin/busybox", "sleep", "1000000"]
    stop_signal: KILL
    ports: ["18090-18094:90-94"]
    depends_on: [web, name]
`
	if err := os.WriteFile(d.dir+"/docker-compose.yml", []byte(services), 0o644); err != nil {
		t.Fatal(err)
	}
	compose := func(args ...string) {
		t.Helper()
		cmd := exec.Command(lookPath(t, "docker-compose"), append([]string{"-p", "three", "-f", d.dir + "/docker-compose.yml"}, args...)...)
		cmd.Env = d.environment()
		if r := finish(t, n.Host, cmd, 120*time.Second); r.code != 0 {
			t.Fatalf("docker-compose %s: status %d: %s%s", strings.Join(args, " "), r.code, r.stdout, r.stderr)
		}
	}
	compose("up", "-d")
	all := [][]string{onAll("tcp", 18080), {"tcp 127.0.0.1:18443"}, onAll("udp", 18053)}
	for port := 18090; port < 18095; port++ {
		all = append(all, onAll("tcp", port))
	}
	expectListeners(t, n, "docker-compose up", all...)
	for _, address := range []string{"127.0.0.1:18080", "[::1]:18080", "127.0.0.1:18443", at(topo.Host4, 18080)} {
		if status := httpStatus(n.Host, address); status != "HTTP/1.1 404 Not Found" && status != "HTTP/1.0 404 Not Found" {
			t.Errorf("the web service at %s: %q", address, status)
		}
	}
	compose("stop", "many")
	expectListeners(t, n, "docker-compose stop many", all[:3]...)
	compose("down", "-t", "1")
	expectListeners(t, n, "docker-compose down")
}

// httpStatus asks for a page that is not there.
func httpStatus(ns *topo.NS, address string) string {
	c, err := ns.Dial("tcp", address, 10*time.Second)
	if err != nil {
		return err.Error()
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	fmt.Fprintf(c, "GET /no-such-page HTTP/1.0\r\n\r\n")
	text, err := io.ReadAll(c)
	if err != nil {
		return err.Error()
	}
	line, _, _ := strings.Cut(string(text), "\r\n")
	return line
}

// TestPublishNginx: nginx in a container logs its clients, by their own addresses. Port 80
// is of systemd's.
func TestPublishNginx(t *testing.T) {
	needDockerd(t)
	need(t, "nginx", "systemd-socket-activate")
	n := newTopology(t)
	d := newUpDocker(t, dockerdKind{name: "20.10", program: lookPath(t, "dockerd")}, "")
	sockets := activation{proto: "tcp", listen: []string{"0.0.0.0:80", "[::]:80"}, only: true, want: onAll("tcp", 80)}
	group := newGroup(t)
	d.starter = func(up *exec.Cmd) *exec.Cmd {
		group.Go(func() { sockets.wake(t, n) })
		return sockets.command(t, n, user{}, up)
	}
	d.up(t, n)
	d.must(t, "import", busyboxImage(t, d.dir), dockerImage)
	const config = `daemon off; master_process off; pid /tmp/pid; error_log stderr; user root;
events {}
http { log_format who '$remote_addr:$remote_port $status'; access_log /dev/stdout who; client_body_temp_path /tmp; proxy_temp_path /tmp;
	fastcgi_temp_path /tmp; uwsgi_temp_path /tmp; scgi_temp_path /tmp; server { listen 80; location / { return 204; } } }
`
	if err := os.WriteFile(d.dir+"/nginx.conf", []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	options := []string{"run", "-d", "--stop-signal", "KILL", "-p", "80:80", "-v", d.dir + "/nginx.conf:/etc/nginx.conf:ro"}
	for _, dir := range []string{"/usr", "/lib", "/lib64", "/etc/passwd", "/etc/group"} { // no image of Debian's is at hand
		if _, err := os.Stat(dir); err == nil {
			options = append(options, "-v", dir+":"+dir+":ro")
		}
	}
	id := d.must(t, append(options, dockerImage, lookPath(t, "nginx"), "-c", "/etc/nginx.conf")...)
	expectListeners(t, n, "docker run", sockets.want)
	loopback, own, other := clientsOf(n, families[0])
	for _, c := range []client{loopback, own, other} {
		to := topo.Host4
		if c.from.IsLoopback() {
			to = c.from
		}
		var said string
		var conn net.Conn
		if !eventually(20*time.Second, func() bool { // until nginx listens
			var err error
			if conn, err = c.ns.DialFrom("tcp", at(c.from, 0), at(to, 80)); err != nil {
				said = err.Error()
				return false
			}
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(10 * time.Second))
			fmt.Fprintf(conn, "GET / HTTP/1.0\r\n\r\n")
			text, _ := io.ReadAll(conn)
			said = string(text)
			return strings.HasPrefix(said, "HTTP/1.1 204")
		}) {
			t.Errorf("nginx, from %s: %q: %s", c.name, said, d.must(t, "logs", id))
			continue
		}
		want := conn.LocalAddr().String() + " 204"
		if c.from.IsLoopback() {
			want = topo.Gateway4.String() + ":"
		}
		if !eventually(20*time.Second, func() bool { return strings.Contains(d.must(t, "logs", id), want) }) {
			t.Errorf("nginx, from %s: expected %q in\n%s", c.name, want, d.must(t, "logs", id))
		}
	}
	d.must(t, "rm", "-f", id)
	expectListeners(t, n, "docker rm", sockets.want)
}

// TestPublishDockerClients: the client finds the engine's dockerd by slipway and by the
// socket.
func TestPublishDockerClients(t *testing.T) {
	needDockerd(t)
	n := newTopology(t)
	d := newUpDocker(t, dockerdKind{name: "20.10", program: lookPath(t, "dockerd")}, "")
	d.up(t, n)
	name := d.engine.name
	if r := d.engine.call(t, "docker", name, "--", "info", "-f", "{{.DockerRootDir}} {{.Driver}}"); r.code != 0 || !strings.HasPrefix(r.stdout, "/var/lib/slipway/"+name+"/") {
		t.Errorf("slipway docker: status %d: %s%s", r.code, r.stdout, r.stderr)
	}
	if r := d.engine.call(t, "docker", name, "--", "inspect", "no-such-thing"); r.code != 1 {
		t.Errorf("slipway docker with an error: status %d: %s", r.code, r.stderr)
	}
	st, err := os.Stat(d.sock)
	if err != nil || st.Mode().Perm()&0o007 != 0 {
		t.Errorf("the socket: %v, %v", st, err)
	}
	if r := d.engine.call(t, "docker", "no-such-engine", "--", "ps"); r.code != 125 || badMessage(r.stderr) != "" {
		t.Errorf("slipway docker no-such-engine: status %d: %s", r.code, r.stderr)
	}
}
