package test

import (
	"fmt"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/slipway-net/slipway/test/topo"
	"golang.org/x/sys/unix"
)

// Ports of a swarm's services: a real swarm of one node, which needs VXLAN in the kernel.
// Ports of mode host are those of a task's container. Those of mode ingress lead by
// dockerd's rules to a namespace of the swarm's, and from there by IPVS to a task. Where
// the kernel has no IPVS dockerd does not load those rules: then the tests do, and answer
// in that namespace.

// swarm is a dockerd that manages one, and runs its tasks.
type swarm struct {
	*docker
	net  *topo.Topology
	pid  func() int // of dockerd
	exec string     // its exec root, in its mounts
}

// init makes the swarm.
func (s *swarm) init(t *testing.T) {
	t.Helper()
	// Tasks pull their image. This registry is not there at once, not after a search for its name.
	s.must(t, "tag", dockerImage, swarmImage)
	s.must(t, "swarm", "init", "--advertise-addr", "slipway0")
	t.Cleanup(func() { s.dump(t) })
}

const swarmImage = "127.0.0.1:5000/busybox:1"

// dump says what became of a failed test's tasks.
func (s *swarm) dump(t *testing.T) {
	if t.Failed() && !s.engine.ended {
		for _, args := range [][]string{{"service", "ls"}, {"ps", "-a", "--no-trunc"}, {"node", "ps", "--no-trunc"}} {
			t.Logf("docker %s:\n%s", strings.Join(args, " "), s.must(t, args...))
		}
	}
}

// service starts one.
func (s *swarm) service(t *testing.T, name string, options ...string) {
	t.Helper()
	args := append([]string{"service", "create", "--detach", "--name", name, "--no-resolve-image", "--restart-delay", "100ms", "--stop-signal", "KILL"}, options...)
	s.must(t, append(args, swarmImage, "/bin/busybox", "sleep", "1000000")...)
}

// update changes one.
func (s *swarm) update(t *testing.T, name string, options ...string) {
	t.Helper()
	s.must(t, append(append([]string{"service", "update", "--detach", "--no-resolve-image"}, options...), name)...)
}

// task waits for a container of a service that is not other, and returns its id.
func (s *swarm) task(t *testing.T, service, other string) (id string) {
	t.Helper()
	if !eventually(60*time.Second, func() bool {
		id = s.must(t, "ps", "-q", "--no-trunc", "--filter", "label=com.docker.swarm.service.name="+service)
		return id != other && id != "" && !strings.Contains(id, "\n")
	}) {
		t.Fatalf("service %s has no task but %q: %s", service, id, s.must(t, "service", "ps", "--no-trunc", service))
	}
	return id
}

// serveIngress answers at a service's ingress port, in its task where there is IPVS. It
// reports whether clients are seen with their own addresses.
func (s *swarm) serveIngress(t *testing.T, guest *topo.NS, service string, port int) (own bool) {
	t.Helper()
	task := s.task(t, service, "")
	if _, err := guest.Run("", "test", "-e", "/proc/thread-self/net/ip_vs"); err == nil {
		s.inside(t, task)
		return false
	}
	note(t, "this kernel has no IPVS (CONFIG_IP_VS): a swarm's ingress is tested up to it")
	sandbox, err := topo.OpenNS("ingress", fmt.Sprintf("/proc/%d/root%s/netns/ingress_sbox", s.pid(), s.exec))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(sandbox.Close)
	tellSource(t, sandbox, port)
	to, _, _ := strings.Cut(s.must(t, "network", "inspect", "docker_gwbridge", "-f", `{{(index .Containers "ingress-sbox").IPv4Address}}`), "/")
	for _, proto := range []string{"tcp", "udp"} { // as dockerd has them in DOCKER-INGRESS
		script := fmt.Sprintf(`for chain in PREROUTING OUTPUT; do
	iptables -w -t nat -I $chain -m addrtype --dst-type LOCAL -p %[1]s --dport %[2]d -j DNAT --to-destination %[3]s:%[2]d || exit
done
iptables -w -I FORWARD -p %[1]s -d %[3]s --dport %[2]d -j ACCEPT
iptables -w -I FORWARD -p %[1]s -s %[3]s --sport %[2]d -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT`, proto, port, to)
		if _, err := guest.Run("", "sh", "-ec", script); err != nil {
			t.Fatal(err)
		}
	}
	return true
}

// expectClients asks a port from everywhere; seen is whether clients keep their addresses.
func (s *swarm) expectClients(t *testing.T, port int, seen bool) {
	t.Helper()
	loopback, own, other := clientsOf(s.net, families[0])
	for _, c := range []client{loopback, own, other} {
		want, to := "client", topo.Host4
		if c.from.IsLoopback() {
			want, to = "gateway", c.from
		}
		for _, proto := range []string{"tcp", "udp"} {
			got, err := c.ask(proto, netip.AddrPortFrom(to, uint16(port)))
			problem := ""
			if seen {
				problem = got.differs(want, families[0])
			}
			if err != nil || problem != "" {
				t.Errorf("port %d/%s, from %v: %s %v", port, proto, c.from, problem, err)
			}
		}
	}
}

// life is that of two services, up to where both are published, and what listens then.
func (s *swarm) life(t *testing.T, guest *topo.NS) (want [][]string) {
	t.Helper()
	n := s.net
	s.init(t)
	expectListeners(t, n, "swarm init")
	s.service(t, "web", "--publish", "published=18080,target=80", "--publish", "published=18080,target=80,protocol=udp", "--publish", "published=18081,target=81")
	web := []string{"tcp 0.0.0.0:18080", "udp 0.0.0.0:18080"}
	expectListeners(t, n, "service create", web, []string{"tcp 0.0.0.0:18081"})
	s.expectClients(t, 18080, s.serveIngress(t, guest, "web", 18080))
	s.update(t, "web", "--publish-rm", "81")
	expectListeners(t, n, "--publish-rm", web)
	s.update(t, "web", "--publish-add", "published=18082,target=82")
	expectListeners(t, n, "--publish-add", web, []string{"tcp 0.0.0.0:18082"})

	s.service(t, "node", "--publish", "published=18083,target=80,mode=host", "--publish", "published=18083,target=80,mode=host,protocol=udp")
	all := [][]string{web, {"tcp 0.0.0.0:18082"}, onAll("tcp", 18083), onAll("udp", 18083)}
	expectListeners(t, n, "mode=host", all...)
	first := s.task(t, "node", "")
	s.inside(t, first)
	s.expectClients(t, 18083, true)
	s.kill(t, first)
	s.inside(t, s.task(t, "node", first))
	expectListeners(t, n, "the task was killed", all...)
	reach(t, n, "tcp", 18083)
	s.must(t, "service", "scale", "--detach", "node=0")
	expectListeners(t, n, "no task", all[:2]...)
	s.must(t, "service", "scale", "--detach", "node=1")
	expectListeners(t, n, "a task again", all...)
	return all
}

// end is that of what is left after life.
func (s *swarm) end(t *testing.T, all [][]string) {
	t.Helper()
	s.must(t, "service", "rm", "web")
	expectListeners(t, s.net, "service rm", all[2:]...)
	s.must(t, "service", "create", "--detach", "--name", "last", "--publish", "18084:80", "--replicas", "0", swarmImage)
	expectListeners(t, s.net, "a service without tasks", append(all[2:], []string{"tcp 0.0.0.0:18084"})...)
	s.must(t, "swarm", "leave", "--force")
	expectListeners(t, s.net, "swarm leave")
}

// TestPublishSwarm: a swarm in `slipway up`.
func TestPublishSwarm(t *testing.T) {
	needDockerd(t)
	eachDockerd(t, func(t *testing.T, k dockerdKind) {
		n := newTopology(t)
		d := newUpDocker(t, k, "")
		d.up(t, n)
		d.must(t, "import", busyboxImage(t, d.dir), dockerImage)
		s := &swarm{docker: d, net: n, pid: func() int { return d.dockerd(t) }, exec: d.engine.stateDir() + "/" + d.engine.name + "/docker"}
		all := s.life(t, d.engine.guest)
		d.stop(t)
		expectListeners(t, n, "slipway stopped")
		d.up(t, n)
		expectListeners(t, n, "slipway started again", all...)
		s.end(t, all)
	})
}

// TestPublishSwarmAPI: a swarm in an engine that slipway watches by docker_api, while
// either is killed.
func TestPublishSwarmAPI(t *testing.T) {
	needDockerd(t)
	n := newTopology(t)
	a, name := newAttachable(t, n), newName()
	d := &outsideDocker{docker: *newDocker(t, ""), space: a.NS, program: lookPath(t, "dockerd"), options: []string{"--userland-proxy=false"}}
	d.engine = &engine{name: name, net: n}
	flags := []string{"--config", d.dir + "/slipway.toml"}
	if err := os.WriteFile(d.dir+"/slipway.toml", []byte("docker_api = \"unix://"+d.dir+"/sock\"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	e := a.attachAs(t, name, flags...)
	d.start(t)
	t.Cleanup(func() { d.end(t, syscall.SIGTERM) })
	d.must(t, "import", busyboxImage(t, d.dir), dockerImage)
	s := &swarm{docker: &d.docker, net: n, pid: func() int { return d.cmd.Process.Pid }, exec: d.dir + "/exec"}
	all := s.life(t, a.NS)
	e.cmd.Process.Signal(unix.SIGKILL)
	<-e.done
	expectListeners(t, n, "slipway was killed")
	e = a.attachAs(t, name, flags...)
	expectListeners(t, n, "slipway is back", all...)
	d.end(t, syscall.SIGKILL)
	expectListeners(t, n, "dockerd was killed")
	d.start(t)
	expectListeners(t, n, "dockerd is back", all...)
	s.end(t, all)
	d.end(t, syscall.SIGTERM)
	a.detach(t, e)
}
