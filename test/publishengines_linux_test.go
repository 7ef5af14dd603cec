package test

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/slipway-net/slipway/test/topo"
)

// Engines that were there before slipway, or that have no proxy: ports by guest.sock and
// by the Docker API, over the ends of slipway and of the engine.

// outsideDocker is a dockerd that somebody else started in a namespace of his own.
type outsideDocker struct {
	docker
	space   *topo.NS
	program string
	options []string
	env     []string
	cmd     *exec.Cmd
	out     log
}

// start starts dockerd and waits until it answers. It may be called again.
func (d *outsideDocker) start(t *testing.T) {
	t.Helper()
	d.cmd = exec.Command(d.program, append([]string{"--data-root", d.dir + "/data", "--exec-root", d.dir + "/exec",
		"--pidfile", d.dir + "/pid", "-H", "unix://" + d.dir + "/sock", "--config-file", d.dir + "/daemon.json"}, d.options...)...)
	user{}.dress(d.cmd)
	d.cmd.Env = append(d.cmd.Env, d.env...)
	d.cmd.Stdout, d.cmd.Stderr = &d.out, &d.out
	if err := d.space.Start(d.cmd); err != nil {
		t.Fatal(err)
	}
	if !eventually(90*time.Second, func() bool { return d.run(context.Background(), "version") == nil }) {
		t.Fatalf("dockerd is not ready after 90 s: %s", tail(d.out.String(), 4<<10))
	}
}

// end ends it with a signal.
func (d *outsideDocker) end(t testing.TB, sig syscall.Signal) {
	t.Helper()
	if d.cmd == nil || d.cmd.ProcessState != nil {
		return
	}
	d.cmd.Process.Signal(sig)
	timer := time.AfterFunc(40*time.Second, func() { d.cmd.Process.Kill() })
	d.cmd.Wait()
	if !timer.Stop() {
		t.Errorf("dockerd did not end: %s", tail(d.out.String(), 4<<10))
	}
}

// TestPublishAttach: slipway comes and goes under a running dockerd, and dockerd under a
// running slipway.
func TestPublishAttach(t *testing.T) {
	needDockerd(t)
	for _, api := range []bool{false, true} {
		t.Run(map[bool]string{false: "docker-proxy", true: "docker_api"}[api], func(t *testing.T) {
			n := newTopology(t)
			a, name := newAttachable(t, n), newName()
			d := &outsideDocker{docker: *newDocker(t, ""), space: a.NS, program: lookPath(t, "dockerd")}
			d.engine = &engine{name: name, net: n}
			var flags []string
			if api {
				d.options = []string{"--userland-proxy=false"}
				flags = []string{"--config", d.dir + "/slipway.toml"}
				if err := os.WriteFile(d.dir+"/slipway.toml", []byte("docker_api = \"unix://"+d.dir+"/sock\"\n"), 0o644); err != nil {
					t.Fatal(err)
				}
			} else {
				// A current one drops what comes from outside for a container's address.
				d.program = newestDockerd(t)
				d.options = []string{"--userland-proxy-path", proxyPath, "--feature", "time-namespaces=false"}
				d.env = []string{"SLIPWAY_SOCK=" + d.engine.sock("guest.sock"), "DOCKER_MIN_API_VERSION=1.24"}
			}
			e := a.attachAs(t, name, flags...)
			d.start(t)
			t.Cleanup(func() { d.end(t, syscall.SIGTERM) })
			d.must(t, "import", busyboxImage(t, d.dir), dockerImage)
			c := d.runImage(t, "--restart", "always", "-p", "18080:80", "-p", "18081:80/udp", "-p", "127.0.0.1:18082:80")
			all := [][]string{onAll("tcp", 18080), onAll("udp", 18081), {"tcp 127.0.0.1:18082"}}
			expectListeners(t, n, "docker run", all...)
			owner := ", slipway-docker-)  " // as the kernel has the proxy's name
			if api {
				owner = "docker: " + strings.TrimPrefix(d.must(t, "inspect", "-f", "{{.Name}}", c), "/") + "  "
			}
			expectOwner(t, e, owner)
			d.inside(t, c)
			reach(t, n, "tcp", 18080)
			reach(t, n, "udp", 18081)
			reach(t, n, "tcp", 18082)

			a.detach(t, e)
			expectListeners(t, n, "slipway ended")
			e = a.attachAs(t, name, flags...)
			expectListeners(t, n, "slipway is back", all...)
			reach(t, n, "tcp", 18080)
			e.cmd.Process.Kill()
			<-e.done
			expectListeners(t, n, "slipway was killed")
			if api {
				// What happens meanwhile is noticed later.
				d.must(t, "rm", "-f", c)
				c = d.runImage(t, "--restart", "always", "-p", "18083:80")
				all = [][]string{onAll("tcp", 18083)}
			}
			e = a.attachAs(t, name, flags...)
			expectListeners(t, n, "slipway is back again", all...)

			d.end(t, syscall.SIGKILL)
			expectListeners(t, n, "dockerd was killed")
			d.start(t)
			expectListeners(t, n, "dockerd is back", all...)
			d.must(t, "rm", "-f", c)
			expectListeners(t, n, "docker rm")
			d.end(t, syscall.SIGTERM)
			a.detach(t, e)
		})
	}
}

// expectOwner wants every published port to have been asked for by that one.
func expectOwner(t *testing.T, e *engine, owner string) {
	t.Helper()
	r := e.call(t, "ports", "ls", e.name)
	if lines := strings.Count(r.stdout, "\n"); r.code != 0 || lines < 2 || strings.Count(r.stdout, owner) != lines-1 {
		t.Errorf("ports ls: status %d, not all are of %q:\n%s%s", r.code, owner, r.stdout, r.stderr)
	}
}

// TestDockerProxy: without slipway slipway-docker-proxy is a proxy like dockerd's own, for
// clients in dockerd's namespace.
func TestDockerProxy(t *testing.T) {
	needDockerd(t)
	eachDockerd(t, func(t *testing.T, k dockerdKind) {
		ns, err := topo.NewNS("dockerd's")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(ns.Close)
		// An address that both families have a way to.
		if err := ns.IP("link add name up0 type bridge\naddr add 192.0.2.2/24 dev up0\naddr add 2001:db8:9::2/64 dev up0 nodad\nlink set up0 up\n"); err != nil {
			t.Fatal(err)
		}
		d := &outsideDocker{docker: *newDocker(t, ""), space: ns, program: k.program,
			options: append(k.options, "--userland-proxy-path", proxyPath), env: []string{"DOCKER_MIN_API_VERSION=1.24"}}
		d.start(t)
		t.Cleanup(func() { d.end(t, syscall.SIGTERM) })
		d.must(t, "import", busyboxImage(t, d.dir), dockerImage)
		c := d.runImage(t, "-p", "18080:80", "-p", "18080:80/udp", "-p", "127.0.0.1:18081:80", "-p", "192.0.2.2:18082:80/udp")
		want := [][]string{onAll("tcp", 18080), onAll("udp", 18080), {"tcp 127.0.0.1:18081", "udp 192.0.2.2:18082"}}
		expectListenersIn(t, ns, "docker run", want...)
		d.inside(t, c)
		for _, to := range []string{"127.0.0.1:18080", "[::1]:18080", "[2001:db8:9::2]:18080", "127.0.0.1:18081"} {
			address := netip.MustParseAddrPort(to)
			for _, proto := range []string{"tcp", "udp"} {
				if proto == "udp" && address.Port() == 18081 {
					proto, address = "udp", netip.MustParseAddrPort("192.0.2.2:18082")
				}
				if _, err := (client{ns: ns, from: address.Addr()}).ask(proto, address); err != nil {
					t.Errorf("%s to %v: %v", proto, address, err)
				}
			}
		}
		l, err := ns.Listen("192.0.2.2:18090")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
		defer cancel()
		if out, err := d.command(ctx, "run", "--name", "unlucky", "-p", "192.0.2.2:18090:80", dockerImage, "/bin/busybox", "true").CombinedOutput(); err == nil ||
			!strings.Contains(string(out), "address already in use") && !strings.Contains(string(out), "taken") {
			t.Errorf("docker run with a port that is taken: %v: %s", err, out)
		}
		d.must(t, "rm", "-f", "unlucky", c)
		expectListenersIn(t, ns, "docker rm", []string{"tcp 192.0.2.2:18090"})
	})
}

// TestPublishPodman: containers of podman, by the API that it has in common with Docker.
func TestPublishPodman(t *testing.T) {
	needPublish(t, "podman", "busybox", "/usr/lib/podman/netavark")
	if !isRoot() {
		missing(t, "root: netavark makes its own user namespace otherwise")
	}
	t.Cleanup(removePodmanCgroups)
	hide(t, "/dev/shm")
	hide(t, "/var/lib/containers")
	n := newTopology(t)
	dir, err := os.MkdirTemp("", "slipway-podman-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.WriteFile(dir+"/slipway.toml", []byte("docker_api = \"unix://"+dir+"/sock\"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	p := &podman{dir: dir, events: "file"}
	p.engine = startEngine(t, n, engineOptions{flags: []string{"--config", dir + "/slipway.toml"}})
	t.Cleanup(p.remove)
	p.makeImage(t)
	stop := p.serve(t)
	run := func(options ...string) string {
		return p.must(t, append(append([]string{"run", "-d"}, options...), podmanImage, "/bin/busybox", "sleep", "1000000")...)
	}
	first := run("--name", "shop", "-p", "18080:80", "-p", "18081:80/udp", "-p", "127.0.0.1:18082:80")
	ofFirst := [][]string{onAll("tcp", 18080), onAll("udp", 18081), {"tcp 127.0.0.1:18082"}}
	expectListeners(t, n, "podman run", ofFirst...)
	expectOwner(t, p.engine, "docker: shop  ")
	pid := p.must(t, "inspect", "-f", "{{.State.Pid}}", first)
	ns, err := topo.OpenNS("container", "/proc/"+pid+"/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	tellSource(t, ns, 80)
	reach(t, n, "tcp", 18080)
	reach(t, n, "udp", 18081)
	second := run("-p", "18083:80")
	expectListeners(t, n, "a second container", append(ofFirst, onAll("tcp", 18083))...)
	third := run("-p", "18090-18092:90-92")
	ofThird := slices.Concat(onAll("tcp", 18090), onAll("tcp", 18091), onAll("tcp", 18092))
	expectListeners(t, n, "a range", append(ofFirst, onAll("tcp", 18083), ofThird)...)
	p.must(t, "rename", third, "renamed")
	p.must(t, "stop", "-t", "0", first)
	expectListeners(t, n, "podman stop", onAll("tcp", 18083), ofThird)
	p.must(t, "start", first)
	expectListeners(t, n, "podman start", append(ofFirst, onAll("tcp", 18083), ofThird)...)
	if pid, err := strconv.Atoi(p.must(t, "inspect", "-f", "{{.State.Pid}}", "renamed")); err != nil || pid < 2 || syscall.Kill(pid, syscall.SIGKILL) != nil {
		t.Fatalf("the renamed container has pid %d: %v", pid, err)
	}
	expectListeners(t, n, "kill -9 of a container", append(ofFirst, onAll("tcp", 18083))...)
	p.must(t, "rm", "-f", "-t", "0", "renamed")
	p.must(t, "stop", "-t", "0", first)
	expectListeners(t, n, "podman stop again", onAll("tcp", 18083))
	stop()
	expectListeners(t, n, "podman's service ended")
	p.serve(t)
	expectListeners(t, n, "podman's service is back", onAll("tcp", 18083))
	p.must(t, "rm", "-f", "-t", "0", first, second)
	expectListeners(t, n, "podman rm")
}

// serve runs podman's service.
func (p *podman) serve(t testing.TB) (stop func()) {
	t.Helper()
	os.Remove(p.dir + "/sock")
	cmd := p.engine.slipway(append([]string{"exec", p.engine.name, "--"}, p.command("system", "service", "--time=0", "unix://"+p.dir+"/sock")...)...)
	cmd.Stderr = &p.engine.stderr
	if err := p.engine.net.Host.Start(cmd); err != nil {
		t.Fatal(err)
	}
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cmd.Process.Signal(syscall.SIGTERM)
		timer := time.AfterFunc(10*time.Second, func() { cmd.Process.Kill() })
		cmd.Wait()
		timer.Stop()
	}
	t.Cleanup(stop)
	if !eventually(20*time.Second, func() bool {
		_, err := os.Stat(p.dir + "/sock")
		return err == nil
	}) {
		t.Fatalf("podman's service has no socket: %s", fmt.Sprint(tail(p.engine.stderr.String(), 4<<10)))
	}
	return stop
}
