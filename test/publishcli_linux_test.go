package test

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/slipway-net/slipway/test/topo"
)

// The command line and slipway.toml: what is asked for is there at once, or an error
// says why not. Nothing here depends on the path.

// needPublish is need for the tests of published ports.
func needPublish(t testing.TB, commands ...string) {
	t.Helper()
	need(t, append([]string{"ip", "nft", "ss"}, commands...)...)
}

// TestPublishCLI follows ports from their beginning to their end, by flags and commands.
func TestPublishCLI(t *testing.T) {
	needPublish(t)
	eachUser(t, func(t *testing.T, n *topo.Topology, u user) {
		e := startEngine(t, n, engineOptions{user: u, flags: []string{"-p", "18080:81", "-p", "127.0.0.1:18081:81/udp", "-p", "18090-18092:81-83", "-p", "18080:81/tcp,18091-18092:82-83"}}) // some of them twice
		tellSource(t, e.guest, enginePort)
		base := [][]string{onAll("tcp", 18080), {"udp 127.0.0.1:18081"}, onAll("tcp", 18090), onAll("tcp", 18091), onAll("tcp", 18092)}
		expectListeners(t, n, "with -p", base...)
		reach(t, n, "tcp", 18080)
		reach(t, n, "udp", 18081)

		e.publish(t, "18082:81", "[::1]:18083:81", "18084:81/udp")
		expectListeners(t, n, "after ports add", append(base, onAll("tcp", 18082), []string{"tcp [::1]:18083"}, onAll("udp", 18084))...)
		reach(t, n, "tcp", 18082)
		if p := portAt(t, e, 18082); p.Spec.Proto != "tcp" || p.Spec.ChildPort != enginePort || len(p.Listens) != 2 || p.Owner == "" {
			t.Errorf("listed as %+v", p)
		}
		// Nobody minds what is there already, also with -p.
		before := readPorts(t, e)
		e.publish(t, "18082:81", "18080:81", "127.0.0.1:18081:81/udp")
		if after := readPorts(t, e); len(after) != len(before) {
			t.Errorf("added twice: %v, before %v", after, before)
		}

		e.withdraw(t, "18082:81", fmt.Sprint(portAt(t, e, 18083).ID), "18084:81/udp", "18080:81", "127.0.0.1:18081:81/udp", "18090-18092:81-83")
		expectListeners(t, n, "after ports rm")
		if all := readPorts(t, e); len(all) != 0 {
			t.Errorf("listed after ports rm: %v", all)
		}
		// What was asked for in other words is not meant, and named.
		e.publish(t, "18085:127.0.0.1:81", "127.0.0.1:18086:81")
		for spec, want := range map[string]string{"18085:81": "18085:127.0.0.1:81/tcp (ID ", "18086:81": "127.0.0.1:18086:81/tcp (ID "} {
			if r := e.call(t, "ports", "rm", e.name, spec); r.code != 125 || badMessage(r.stderr) != "" || !strings.Contains(r.stderr, "\nhint: did you mean "+want) {
				t.Errorf("ports rm %s: status %d, expected %s: %s", spec, r.code, want, r.stderr)
			}
		}
		e.withdraw(t, "18085:127.0.0.1:81", "127.0.0.1:18086:81")
		// Twice is once.
		if r := e.call(t, "ports", "add", e.name, "18087:81", "18087:81"); r.code != 0 || strings.Count(r.stdout, "\n") != 2 {
			t.Errorf("ports add, twice the same: status %d\n%s%s", r.code, r.stdout, r.stderr)
		}
		if r := e.call(t, "ports", "rm", e.name, "18087:81", "18087:81"); r.code != 0 || len(readPorts(t, e)) != 0 {
			t.Errorf("ports rm, twice the same: status %d: %s", r.code, r.stderr)
		}
		// What was withdrawn can be had again at once.
		e.publish(t, "18082:81")
		reach(t, n, "tcp", 18082)
	})
}

// withdraw removes ports with the command and wants no error.
func (e *engine) withdraw(t testing.TB, args ...string) {
	t.Helper()
	if r := e.call(t, append([]string{"ports", "rm", e.name}, args...)...); r.code != 0 {
		t.Errorf("ports rm %s: status %d: %s", strings.Join(args, " "), r.code, r.stderr)
	}
}

// reach asks a published port from the host's IPv4 loopback.
func reach(t testing.TB, n *topo.Topology, proto string, port int) {
	t.Helper()
	loopback, _, _ := clientsOf(n, families[0])
	s, err := loopback.ask(proto, netip.AddrPortFrom(loopback.from, uint16(port)))
	if err != nil || s.seen.Addr() != topo.Gateway4 {
		t.Errorf("published port %d/%s: %v, the guest sees %v", port, proto, err, s.seen)
	}
}

// TestPublishAnyPort: port 0 is chosen by the host, one number for both families, and
// said.
func TestPublishAnyPort(t *testing.T) {
	needPublish(t)
	eachUser(t, func(t *testing.T, n *topo.Topology, u user) {
		e := startEngine(t, n, engineOptions{user: u})
		tellSource(t, e.guest, enginePort)
		for _, proto := range []string{"tcp", "udp"} {
			text := e.publish(t, "0:81/"+proto)
			all := readPorts(t, e)
			if len(all) != 1 {
				t.Fatalf("listed: %+v", all)
			}
			p := all[0]
			if len(p.Listens) != 2 || p.Listens[0].Port() != p.Listens[1].Port() || p.Spec.ParentPort != int(p.Listens[0].Port()) || p.Spec.ParentPort == 0 {
				t.Errorf("any port of %s: listed as %+v", proto, p)
			}
			if !strings.Contains(text, fmt.Sprint(p.Spec.ParentPort)) {
				t.Errorf("ports add does not say which port: %s", text)
			}
			reach(t, n, proto, p.Spec.ParentPort)
			e.withdraw(t, fmt.Sprint(p.ID))
		}
	})
}

// TestPublishErrors: each mistake gets its line and publishes nothing.
func TestPublishErrors(t *testing.T) {
	needPublish(t)
	eachUser(t, func(t *testing.T, n *topo.Topology, u user) {
		e := startEngine(t, n, engineOptions{user: u})
		holder := startHolder(t, n, u, "0.0.0.0:18070")
		for _, tt := range []struct {
			spec, says string
		}{
			{"18070:81", fmt.Sprintf("(pid %d)", holder)},
			{"127.0.0.1:18070:81", fmt.Sprintf("(pid %d)", holder)},
			{"192.0.2.9:18071:81", "192.0.2.9 is not an address of this host"},
			{"[2001:db8:9::9]:18071:81", "2001:db8:9::9 is not an address of this host"},
			{"18071:10.9.8.7:81", "10.9.8.7"}, // the engine has no way to it
			{"18071:81/sctp", "sctp"},
			{"65536:81", "65536"},
			{"18071", "HOSTPORT"},
			{"18071:0", "0"},
			{"18071-18073:81-82", "length"},
			{"2001:db8::1:18071:81", ""},
		} {
			r := e.refused(t, tt.spec, tt.says)
			if r.code != 125 || badMessage(r.stderr) != "" || !strings.Contains(r.stderr, tt.says) {
				t.Errorf("ports add %s: status %d, expected 125 and %q: %s", tt.spec, r.code, tt.says, r.stderr)
			}
		}
		// A guest address that is none: what there is instead is said.
		const own = "\nhint: there are the engine's own 192.168.65.3 and fdc4:f303:9324::3, "
		for _, spec := range []string{"18071:10.9.8.7:81", "18071:[fd00::2]:81"} {
			if r := e.call(t, "ports", "add", e.name, spec); !strings.HasSuffix(r.stderr, own+"and its loopback\n") {
				t.Errorf("ports add %s: %s", spec, r.stderr)
			}
		}
		if err := e.guest.IP("link add v0 type veth peer name v1\nlink set v0 up\nlink set v1 up\naddress add 172.31.0.1/24 dev v0\naddress add fd00:31::1/64 dev v0 nodad"); err != nil {
			t.Fatal(err)
		}
		if r := e.call(t, "ports", "add", e.name, "18071:10.9.8.7:81"); !strings.HasSuffix(r.stderr, own+"its loopback, and its networks 172.31.0.0/24, fd00:31::/64\n") {
			t.Errorf("with networks: %s", r.stderr)
		}
		// The example of ports add --help works in every engine.
		e.withdraw(t, fmt.Sprint(e.example(t)))
		for _, args := range [][]string{{"ports", "rm", e.name, "18070:81"}, {"ports", "rm", e.name, "99"}, {"ports", "ls", "no-such-engine"}, {"ports", "add", e.name}} {
			if r := e.call(t, args...); r.code != 125 || badMessage(r.stderr) != "" {
				t.Errorf("slipway %s: status %d: %s", strings.Join(args, " "), r.code, r.stderr)
			}
		}
		expectListeners(t, n, "after mistakes", []string{"tcp 0.0.0.0:18070"})
		// run: the command is not started.
		for _, spec := range []string{"18070:81", "192.0.2.9:18071:81", "nonsense"} {
			cmd := u.slipway("run", "--name", newName(), "-p", "18072:82", "-p", spec, "--", "echo", "started")
			if r := finish(t, n.Host, cmd, 30*time.Second); r.code != 125 || badMessage(r.stderr) != "" || r.stdout != "" {
				t.Errorf("run -p %s: status %d, stdout %q: %s", spec, r.code, r.stdout, r.stderr)
			} else if spec == "18070:81" && !strings.Contains(r.stderr, "\nhint: ") {
				t.Errorf("run -p %s, no hint: %s", spec, r.stderr)
			}
		}
		expectListeners(t, n, "after run failed", []string{"tcp 0.0.0.0:18070"})
	})
}

// example publishes what the help has as an example, and returns the port's ID.
func (e *engine) example(t testing.TB) uint64 {
	t.Helper()
	const spec = "0:127.0.0.1:3000"
	if r := e.call(t, "ports", "add", "--help"); !strings.Contains(r.stdout, "slipway ports add web "+spec+" --json\n") {
		t.Errorf("the help has no example with %s: %s", spec, r.stdout)
	}
	e.publish(t, spec)
	all := readPorts(t, e)
	if len(all) != 1 {
		t.Fatalf("published %v", all)
	}
	return all[0].ID
}

// refused asks for a port, a few times if need be: on a busy machine the search for who
// has it is given up.
func (e *engine) refused(t testing.TB, spec, says string) (r result) {
	t.Helper()
	for range 5 {
		if r = e.call(t, "ports", "add", e.name, spec); r.code == 0 || strings.Contains(r.stderr, says) {
			return r
		}
	}
	return r
}

// startHolder starts a process of u that listens in host, and returns its pid.
func startHolder(t testing.TB, n *topo.Topology, u user, address string) int {
	t.Helper()
	l, err := listenOnly(n.Host, netip.MustParseAddrPort(address))
	if err != nil {
		t.Fatal(err)
	}
	file, err := l.(*net.TCPListener).File()
	l.Close()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	cmd := exec.Command(helperPath)
	u.dress(cmd)
	cmd.Env = append(cmd.Env, envInner+"="+roleEcho)
	cmd.ExtraFiles = []*os.File{file}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	return cmd.Process.Pid
}

// TestPublishTwoEngines: the second engine that wants a port is told who has it, and has
// it once the first is over.
func TestPublishTwoEngines(t *testing.T) {
	needPublish(t)
	eachUser(t, func(t *testing.T, n *topo.Topology, u user) {
		a := startEngine(t, n, engineOptions{user: u})
		b := startEngine(t, n, engineOptions{user: u})
		a.publish(t, "18080:81")
		want := fmt.Sprintf("is taken by engine %s (pid %d)", a.name, a.cmd.Process.Pid)
		if r := b.refused(t, "18080:81", want); r.code != 125 || !strings.Contains(r.stderr, want) {
			t.Errorf("status %d, expected %q: %s", r.code, want, r.stderr)
		}
		a.withdraw(t, "18080:81")
		b.publish(t, "18080:81")
		expectListeners(t, n, "after the hand-over", onAll("tcp", 18080))
	})
}

// startUp starts `slipway up` with a configuration, whose engine is called NAME there and
// waits until it is told to end.
func startUp(t testing.TB, n *topo.Topology, u user, config string, flags ...string) *engine {
	t.Helper()
	e := &engine{user: u, name: newName(), net: n, done: make(chan struct{})}
	e.before = snapshot(t, n)
	dir, err := os.MkdirTemp("", "slipway-up-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	os.Chmod(dir, 0o755)
	e.config = filepath.Join(dir, "slipway.toml")
	e.configure(t, config)
	e.cmd = e.slipway(slices.Concat([]string{"up", "--config", e.config}, flags, []string{e.name})...)
	e.follow(t)
	return e
}

// configure writes the engine's configuration.
func (e *engine) configure(t testing.TB, config string) {
	t.Helper()
	text := strings.ReplaceAll(config, "NAME", e.name)
	if !strings.Contains(text, "[engine.") {
		text += fmt.Sprintf("\n[engine.%s]\ncommand = [\"sh\", \"-c\", \"echo $$; readlink /proc/self/ns/net; exec cat\"]\n", e.name)
	}
	if err := os.WriteFile(e.config, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// follow starts an engine whose command says its pid and its namespace.
func (e *engine) follow(t testing.TB) {
	t.Helper()
	stdin, out := e.begin(t)
	e.stdin = stdin
	t.Cleanup(func() { e.end(t) })
	var inode uint64
	line := make(chan error, 1)
	go func() {
		_, err := fmt.Fscanf(out, "%d\nnet:[%d]\n", &e.pid, &inode)
		line <- err
		io.Copy(io.Discard, out)
		out.Close()
	}()
	if err := receive(t, line); err != nil {
		t.Fatalf("engine %s did not start: %v\nstderr: %s", e.name, err, e.stderr.String())
	}
	e.enter(t, inode)
}

// TestPublishConfig: slipway.toml, and that a flag goes over it.
func TestPublishConfig(t *testing.T) {
	needPublish(t)
	eachUser(t, func(t *testing.T, n *topo.Topology, u user) {
		e := startUp(t, n, u, `publish = ["18080:81", "127.0.0.1:18081:81/udp", "18080:81"]`)
		tellSource(t, e.guest, enginePort)
		expectListeners(t, n, "with publish", onAll("tcp", 18080), []string{"udp 127.0.0.1:18081"})
		reach(t, n, "tcp", 18080)
		e.end(t)
		expectListeners(t, n, "after the engine")
		startUp(t, n, u, `publish = ["18080:81"]`, "-p", "18082:81")
		expectListeners(t, n, "with publish and -p", onAll("tcp", 18082))
	})
}

// TestPublishReload: HUP has the list of slipway.toml published, what stays untouched.
func TestPublishReload(t *testing.T) {
	needPublish(t)
	eachUser(t, func(t *testing.T, n *topo.Topology, u user) {
		e := startUp(t, n, u, `publish = ["18080:81", "18081:81"]`)
		tellSource(t, e.guest, enginePort)
		e.publish(t, "18090:81", "18081:81") // one of them twice
		ofOthers := append(onAll("tcp", 18090), onAll("tcp", 18081)...)
		stays := portAt(t, e, 18080)
		e.configure(t, `publish = ["18080:81", "18082:81"]`)
		e.cmd.Process.Signal(syscall.SIGHUP)
		expectListeners(t, n, "after HUP", onAll("tcp", 18080), onAll("tcp", 18082), ofOthers)
		if now := portAt(t, e, 18080); now.ID != stays.ID {
			t.Errorf("port 18080 was %d and is %d", stays.ID, now.ID)
		}
		if p := portAt(t, e, 18081); p.Owner != "api" {
			t.Errorf("what only ports add wants any more belongs to %q", p.Owner)
		}
		e.configure(t, `publish = ["nonsense"]`)
		e.cmd.Process.Signal(syscall.SIGHUP)
		if !eventually(10*time.Second, func() bool { return strings.Contains(e.stderr.String(), "nonsense") }) {
			t.Errorf("nothing is said about a file with an error: %s", e.stderr.String())
		}
		expectListeners(t, n, "after HUP with an error", onAll("tcp", 18080), onAll("tcp", 18082), ofOthers)
		e.configure(t, "publish_bind = \"loopback-default\"\npublish = [\"18083:81\"]\n")
		e.cmd.Process.Signal(syscall.SIGHUP)
		expectListeners(t, n, "after HUP with another publish_bind", []string{"tcp 127.0.0.1:18083", "tcp [::1]:18083"}, ofOthers)
		reach(t, n, "tcp", 18083)
	})
}

// TestPublishPolicy: publish_bind, publish_ports and privileged ports.
func TestPublishPolicy(t *testing.T) {
	needPublish(t)
	eachUser(t, func(t *testing.T, n *topo.Topology, u user) {
		loopback := func(port int) []string {
			return []string{fmt.Sprintf("tcp 127.0.0.1:%d", port), fmt.Sprintf("tcp [::1]:%d", port)}
		}
		host := topo.Host4.String()
		for _, tt := range []struct {
			config  string
			spec    string
			refused bool
			want    []string
		}{
			{`publish_bind = "as-asked"`, "18080:81", false, onAll("tcp", 18080)},
			{`publish_bind = "loopback-default"`, "18080:81", false, loopback(18080)},
			{`publish_bind = "loopback-default"`, "0.0.0.0:18080:81", false, loopback(18080)[:1]}, // as dockerd says it
			{`publish_bind = "loopback-default"`, host + ":18080:81", false, []string{"tcp " + host + ":18080"}},
			{`publish_bind = "loopback-only"`, "18080:81", false, loopback(18080)},
			{`publish_bind = "loopback-only"`, "0.0.0.0:18080:81", false, loopback(18080)[:1]},
			{`publish_bind = "loopback-only"`, host + ":18080:81", true, nil},
			{`publish_bind = "loopback-only"`, "127.0.0.2:18080:81", false, []string{"tcp 127.0.0.2:18080"}},
			{`publish_ports = [81, "18000-18079"]`, "18080:81", true, nil},
			{`publish_ports = [81, "18000-18080"]`, "18080:81", false, onAll("tcp", 18080)},
		} {
			e := startUp(t, n, u, tt.config)
			r := e.call(t, "ports", "add", e.name, tt.spec)
			if refused := r.code == 125 && badMessage(r.stderr) == ""; refused != tt.refused || !refused && r.code != 0 {
				t.Errorf("%s, ports add %s: status %d: %s", tt.config, tt.spec, r.code, r.stderr)
			}
			expectListeners(t, n, tt.config+", "+tt.spec, tt.want)
			e.end(t)
		}
	})
}

// TestPublishPrivileged: ports below net.ipv4.ip_unprivileged_port_start are root's, the
// hint names what to do, and that does it.
func TestPublishPrivileged(t *testing.T) {
	needPublish(t)
	eachUser(t, func(t *testing.T, n *topo.Topology, u user) {
		e := startEngine(t, n, engineOptions{user: u})
		if !u.rootless || !isRoot() {
			e.publish(t, "80:81")
			expectListeners(t, n, "as root", onAll("tcp", 80))
			return
		}
		r := e.call(t, "ports", "add", e.name, "80:81")
		if r.code != 125 || badMessage(r.stderr) != "" || !strings.Contains(r.stderr, "hint: ") || !strings.Contains(r.stderr, "net.ipv4.ip_unprivileged_port_start") {
			t.Errorf("status %d: %s", r.code, r.stderr)
		}
		expectListeners(t, n, "refused")
		if err := n.Host.Sysctl("net.ipv4.ip_unprivileged_port_start", "80"); err != nil {
			t.Fatal(err)
		}
		e.publish(t, "80:81")
		expectListeners(t, n, "after the sysctl", onAll("tcp", 80))
	})
}

// TestPublishAuto: what listens in the guest beyond its loopback is published, for as
// long as it does.
func TestPublishAuto(t *testing.T) {
	needPublish(t)
	eachUser(t, func(t *testing.T, n *topo.Topology, u user) {
		// An old friend has one of the ports.
		startHolder(t, n, u, "0.0.0.0:18083")
		taken := []string{"tcp 0.0.0.0:18083"}
		e := startEngine(t, n, engineOptions{user: u, flags: []string{"-p", "auto"}})
		expectListeners(t, n, "nothing listens", taken)
		tellSourceAt(t, e.guest, netip.MustParseAddrPort("127.0.0.1:18080"))
		tellSourceAt(t, e.guest, netip.MustParseAddrPort("[::1]:18080"))
		tellSource(t, e.guest, 18081)
		t.Run("listening", func(t *testing.T) {
			tellSource(t, e.guest, 18082)
			tellSource(t, e.guest, 18083)
			// An ordinary client is none of it.
			c, err := e.guest.ListenUDP("0.0.0.0:0")
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			expectListeners(t, n, "two listen", taken, onAll("tcp", 18081), onAll("udp", 18081), onAll("tcp", 18082), onAll("udp", 18082), onAll("udp", 18083))
			for _, proto := range []string{"tcp", "udp"} {
				reach(t, n, proto, 18081)
			}
			for _, p := range readPorts(t, e) {
				if slices.ContainsFunc(p.Listens, func(a netip.AddrPort) bool { return int(a.Port()) == int(c.LocalAddr().(*net.UDPAddr).Port) }) {
					t.Errorf("a client's port is published: %+v", p)
				}
			}
		})
		expectListeners(t, n, "one listens", taken, onAll("tcp", 18081), onAll("udp", 18081))
		t.Run("of_somebody_else", func(t *testing.T) {
			e.publish(t, "127.0.0.1:18084:18084", "127.0.0.1:18084:18084/udp")
			asked := []string{"tcp 127.0.0.1:18084", "udp 127.0.0.1:18084"}
			others := [][]string{taken, onAll("tcp", 18081), onAll("udp", 18081)}
			tellSource(t, e.guest, 18084)
			// What is opened later is published later: then the first has been seen.
			tellSource(t, e.guest, 18085)
			others = append(others, onAll("tcp", 18085), onAll("udp", 18085))
			expectListeners(t, n, "of somebody else", append(others, asked)...)
			e.withdraw(t, "127.0.0.1:18084:18084", "127.0.0.1:18084:18084/udp")
			tellSource(t, e.guest, 18086)
			others = append(others, onAll("tcp", 18086), onAll("udp", 18086))
			expectListeners(t, n, "withdrawn", others...)
		})
	})
}

// TestPublishSpecJSON: --json of add is one document with what was chosen.
func TestPublishSpecJSON(t *testing.T) {
	needPublish(t)
	e := startEngine(t, newTopology(t), engineOptions{})
	var added struct {
		Ports []portDoc `json:"ports"`
	}
	text := e.publish(t, "--json", "127.0.0.1:0:81", "[::1]:0:81/udp")
	if err := json.Unmarshal([]byte(text), &added); err != nil || len(added.Ports) != 2 {
		t.Fatalf("%v: %s", err, text)
	}
	for _, p := range added.Ports {
		if len(p.Listens) != 1 || p.Listens[0].Port() == 0 || !p.Listens[0].Addr().IsLoopback() {
			t.Errorf("added as %+v", p)
		}
	}
}
