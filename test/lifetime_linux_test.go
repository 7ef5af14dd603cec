package test

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/slipway-net/slipway/test/topo"
)

// TestDaemonKilled: after kill -9 the agent ends the engine, nothing but the state
// directory stays, and the next start of the same name clears it.
func TestDaemonKilled(t *testing.T) {
	eachUser(t, func(t *testing.T, n *topo.Topology, u user) {
		name := newName()
		before := snapshot(t, n)
		killedDaemon(t, n, u, name, "sleep 1000 & echo $$; wait")
		var more []string
		if !eventually(15*time.Second, func() bool {
			more = withoutState(before.missingFrom(picture(t, n)), u, name)
			return len(more) == 0
		}) {
			t.Errorf("after kill -9 of the daemon:\n%s", strings.Join(more, "\n"))
		}
		if r := finish(t, n.Host, u.slipway("run", "--name", name, "--", "true"), 30*time.Second); r.code != 0 {
			t.Errorf("next start: status %d: %s", r.code, r.stderr)
		}
		before.compare(t, n)
	})
}

// TestDaemonKilledGuestEnds: the next start of the same name waits until the guest of the
// one that was killed has ended: two dockerds on the same files would ruin them.
func TestDaemonKilledGuestEnds(t *testing.T) {
	eachUser(t, func(t *testing.T, n *topo.Topology, u user) {
		name := newName()
		pid := killedDaemon(t, n, u, name, "trap 'sleep 4; exit' TERM; echo $$; while :; do sleep 0.1; done")
		gone := fmt.Sprintf("test ! -d /proc/%d", pid)
		if err := exec.Command("sh", "-c", gone).Run(); err == nil {
			t.Error("the guest has ended already: this shows nothing")
		}
		if r := finish(t, n.Host, u.slipway("run", "--name", name, "--", "sh", "-c", gone), 30*time.Second); r.code != 0 {
			t.Errorf("next start: status %d: %s", r.code, r.stderr)
		}
	})
}

// TestSignalEndsWaiting: a start that waits for such a guest ends at a signal, at once.
func TestSignalEndsWaiting(t *testing.T) {
	for name, args := range map[string][]string{"run": {"--", "true"}, "attach": {"--pid", strconv.Itoa(os.Getpid())}} {
		for sig, code := range map[syscall.Signal]int{syscall.SIGTERM: 128 + 15, syscall.SIGINT: 128 + 2} {
			if name == "attach" {
				code = 0
			}
			t.Run(name+"/"+sig.String(), func(t *testing.T) {
				n, engine := newTopology(t), newName()
				guest := killedDaemon(t, n, user{}, engine, "trap '' TERM; echo $$; while :; do sleep 0.1; done")
				defer func() {
					syscall.Kill(guest, syscall.SIGKILL)
					if r := finish(t, n.Host, user{}.slipway("run", "--name", engine, "--", "true"), 15*time.Second); r.code != 0 {
						t.Errorf("next start: status %d: %s", r.code, r.stderr)
					}
				}()
				cmd := user{}.slipway(append([]string{name, "--name", engine}, args...)...)
				var errOut log
				cmd.Stderr = &errOut
				if err := n.Host.Start(cmd); err != nil {
					t.Fatal(err)
				}
				defer time.AfterFunc(30*time.Second, func() { cmd.Process.Kill() }).Stop()
				if !eventually(15*time.Second, func() bool { return strings.Contains(errOut.String(), "has not ended yet") }) {
					t.Errorf("it does not wait: %s", errOut.String())
				}
				start := time.Now()
				cmd.Process.Signal(sig)
				cmd.Wait()
				if got, took := status(cmd.ProcessState), time.Since(start); got != code || took > 5*time.Second {
					t.Errorf("status %d, expected %d, after %v: %s", got, code, took, errOut.String())
				}
			})
		}
	}
}

// killedDaemon starts an engine with a script that prints its pid, kills slipway as soon as
// it has, and returns the pid.
func killedDaemon(t *testing.T, n *topo.Topology, u user, name, script string) (pid int) {
	t.Helper()
	cmd := u.slipway("run", "--name", name, "--", "sh", "-c", script)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Host.Start(cmd); err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Fscanln(out, &pid); err != nil {
		t.Fatal(err)
	}
	cmd.Process.Kill()
	cmd.Wait()
	return pid
}

// withoutState leaves out the state directory of the engine.
func withoutState(names []string, u user, engine string) (rest []string) {
	dir := filepath.Join(u.stateDir(), engine)
	for _, n := range names {
		if !strings.HasPrefix(n, "file "+dir) {
			rest = append(rest, n)
		}
	}
	return rest
}

// TestOrphans: processes that the command leaves behind end with the engine, with
// and without a pid namespace.
func TestOrphans(t *testing.T) {
	eachUser(t, func(t *testing.T, n *topo.Topology, u user) {
		for _, flags := range [][]string{nil, {"--isolate", "pid"}} {
			args := append([]string{"run", "--name", newName()}, flags...)
			args = append(args, "--", "sh", "-c", "setsid sleep 1000 >/dev/null 2>&1 & (setsid sh -c 'sleep 1000 & sleep 1000' >/dev/null 2>&1 &)")
			start := time.Now()
			r := finish(t, n.Host, u.slipway(args...), 30*time.Second)
			if r.code != 0 || time.Since(start) > 15*time.Second { // less than stop_timeout
				t.Errorf("%v: status %d after %v: %s", flags, r.code, time.Since(start), r.stderr)
			}
		}
	})
}

// TestIsolate looks at the namespaces that --isolate adds.
func TestIsolate(t *testing.T) {
	eachUser(t, func(t *testing.T, n *topo.Topology, u user) {
		run := func(isolate, script string) string {
			t.Helper()
			args := []string{"run", "--name", newName()}
			if isolate != "" {
				args = append(args, "--isolate", isolate)
			}
			r := finish(t, n.Host, u.slipway(append(args, "--", "sh", "-c", script)...), 15*time.Second)
			if r.code != 0 {
				t.Errorf("--isolate %q: status %d: %s", isolate, r.code, r.stderr)
			}
			return strings.TrimSpace(r.stdout)
		}
		if s := run("pid", "ls -d /proc/[0-9]* | wc -l; test -d /proc/$$ && echo own"); !strings.HasSuffix(s, "own") || len(strings.Fields(s)[0]) > 1 {
			t.Errorf("with a pid namespace /proc shows %q", s)
		}
		// The mount namespace follows the host's mounts, or does not.
		for isolate, want := range map[string]string{"": "seen", "mount": "hidden"} {
			dir := runTmp + "/follow"
			if err := os.MkdirAll(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			e := startEngine(t, n, engineOptions{user: u, flags: isolateFlag(isolate)})
			mount(t, dir)
			if err := os.WriteFile(dir+"/file", nil, 0o644); err != nil {
				t.Fatal(err)
			}
			got := "hidden"
			if r := e.exec(t, "test", "-e", dir+"/file"); r.code == 0 {
				got = "seen"
			}
			if got != want {
				t.Errorf("--isolate %q: a new mount of the host is %s, expected %s", isolate, got, want)
			}
			if err := syscall.Unmount(dir, 0); err != nil {
				t.Errorf("unmount while the engine runs: %v", err)
			}
			e.exec(t, "sh", "-c", "mkdir -p /tmp/x; mount -t tmpfs none "+dir) // may fail rootless
			if b, _ := os.ReadFile("/proc/self/mountinfo"); strings.Contains(string(b), dir) {
				t.Errorf("--isolate %q: a mount of the engine shows on the host", isolate)
			}
			e.end(t)
			os.Remove(dir)
		}
	})
}

func isolateFlag(s string) []string {
	if s == "" {
		return nil
	}
	return []string{"--isolate", s}
}

func mount(t testing.TB, dir string) {
	t.Helper()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "mode=0755"); err != nil {
		t.Fatal(err)
	}
}

// TestAttach serves a namespace that somebody else made, until it goes away.
func TestAttach(t *testing.T) {
	for _, by := range []string{"--pid", "--netns"} {
		t.Run(by, func(t *testing.T) {
			eachUser(t, func(t *testing.T, n *topo.Topology, u user) { testAttach(t, n, u, by) })
		})
	}
}

func testAttach(t *testing.T, n *topo.Topology, u user, by string) {
	startNameServer(t, n.World)
	address := transferServer(t, n.World, families[0])
	// The namespace is held by a process of the user.
	how := []string{"--net"}
	if u.rootless {
		how = append(how, "--user", "--map-root-user")
	}
	holder := exec.Command(lookPath(t, "unshare"), append(how, "sh", "-c", "echo $$; exec cat")...)
	u.dress(holder)
	stdin, err1 := holder.StdinPipe()
	out, err2 := holder.StdoutPipe()
	if err1 != nil || err2 != nil {
		t.Fatal(err1, err2)
	}
	if err := n.Host.Start(holder); err != nil {
		t.Fatal(err)
	}
	var pid int
	if _, err := fmt.Fscanln(out, &pid); err != nil {
		t.Fatal(err)
	}
	path := fmt.Sprintf("/proc/%d/ns/net", pid)
	guest, err := topo.OpenNS("attached", path)
	if err != nil {
		t.Fatal(err)
	}
	which := map[string]string{"--pid": fmt.Sprint(pid), "--netns": path}[by]
	name := newName()
	cmd := u.slipway("attach", "--name", name, by, which)
	var errOut log
	cmd.Stderr = &errOut
	if err := n.Host.Start(cmd); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { cmd.Wait(); close(done) }()
	served := eventually(30*time.Second, func() bool { return transfer(guest, address, 1000, 1000) == nil })
	if !served {
		t.Errorf("the namespace is not served within 30 s: %s", errOut.String())
	}
	if r := finish(t, n.Host, u.slipway("status", name), 30*time.Second); r.code != 0 {
		t.Errorf("status: %s", r.stderr)
	}
	guest.Close()
	stdin.Close()
	holder.Wait()
	select {
	case <-done:
		if code := status(cmd.ProcessState); code != 0 {
			t.Errorf("attach ended with status %d: %s", code, errOut.String())
		}
	case <-time.After(15 * time.Second):
		t.Errorf("attach did not end with its namespace: %s", errOut.String())
		cmd.Process.Kill()
		<-done
	}
}

// TestResolvConf: the guest has its own resolv.conf, whatever the host's is and
// becomes.
func TestResolvConf(t *testing.T) {
	const link = "/run/resolved/stub.conf"
	prepare := map[string]func(t *testing.T){
		"file": func(t *testing.T) {},
		"link": func(t *testing.T) {
			os.MkdirAll(filepath.Dir(link), 0o755)
			text, _ := os.ReadFile("/etc/resolv.conf")
			os.WriteFile(link, text, 0o644)
			os.Remove("/etc/resolv.conf")
			if err := os.Symlink("../run/resolved/stub.conf", "/etc/resolv.conf"); err != nil {
				t.Fatal(err)
			}
		},
		"dangling link": func(t *testing.T) {
			os.Remove("/etc/resolv.conf")
			if err := os.Symlink("/run/nowhere/resolv.conf", "/etc/resolv.conf"); err != nil {
				t.Fatal(err)
			}
		},
		"none": func(t *testing.T) { os.Remove("/etc/resolv.conf") },
	}
	for kind, fn := range prepare {
		t.Run(kind, func(t *testing.T) {
			defer writeResolvConf()
			defer os.RemoveAll(filepath.Dir(link))
			fn(t)
			eachUser(t, func(t *testing.T, n *topo.Topology, u user) {
				e := startEngine(t, n, engineOptions{user: u})
				if kind == "none" { // nothing to cover: it says so, and mends it when it can
					if w := strings.Join(readStatus(t, e).Warnings, "\n"); !strings.Contains(w, "/etc/resolv.conf") {
						t.Errorf("no warning about the missing file: %q", w)
					}
					writeResolvConf()
					defer os.Remove("/etc/resolv.conf")
				}
				if !eventually(10*time.Second, func() bool { return ownResolvConf(t, e) == "" }) {
					t.Errorf("at the start: %s", ownResolvConf(t, e))
				}
				if kind == "file" {
					// What NetworkManager and others do to the host's file.
					next := "/etc/resolv.conf.next"
					os.WriteFile(next, []byte("nameserver 203.0.113.99\n"), 0o644)
					if err := os.Rename(next, "/etc/resolv.conf"); err != nil {
						t.Fatal(err)
					}
					if !eventually(10*time.Second, func() bool { return ownResolvConf(t, e) == "" }) {
						t.Errorf("the host's file was replaced: %s", ownResolvConf(t, e))
					}
					writeResolvConf()
				}
				if host, _ := os.ReadFile("/etc/resolv.conf"); strings.Contains(string(host), topo.Gateway4.String()) {
					t.Errorf("the host's own file was changed: %s", host)
				}
			})
		})
	}
}

// ownResolvConf returns what is wrong with the guest's file.
func ownResolvConf(t *testing.T, e *engine) string {
	r := e.exec(t, "cat", "/etc/resolv.conf")
	if r.code != 0 || !strings.Contains(r.stdout, "nameserver "+topo.Gateway4.String()) || strings.Contains(r.stdout, "203.0.113") {
		return fmt.Sprintf("status %d: %s%s", r.code, r.stdout, r.stderr)
	}
	return ""
}

// TestHostWithoutIPv6: a family that the host has no way out for fails at once in
// the guest, as it does on the host.
func TestHostWithoutIPv6(t *testing.T) {
	eachUser(t, func(t *testing.T, n *topo.Topology, u user) {
		if err := n.Host.IP("route del default via " + topo.Router6.String() + "\n"); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { n.Host.IP("route add default via " + topo.Router6.String() + "\n") })
		serve(t, n.World, at(topo.World4, 80), func(c *net.TCPConn) { c.Close() })
		e := startEngine(t, n, engineOptions{user: u})
		if s, took := dialPromptly(e.guest, at(topo.World6, 80), time.Second); s == "ok" || s == "silence" || took > time.Second {
			t.Errorf("IPv6: %s after %v", s, took)
		}
		if s := dialError(e.guest, at(topo.World4, 80), 10*time.Second); s != "ok" {
			t.Errorf("IPv4: %s", s)
		}
	})
}
