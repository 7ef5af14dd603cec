package test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/slipway-net/slipway/test/topo"
)

// eachUser runs the suite as root and as an ordinary user, on one topology each.
func eachUser(t *testing.T, suite func(t *testing.T, n *topo.Topology, u user)) {
	t.Helper()
	need(t, "ip", "nft")
	for _, u := range []user{{}, {rootless: true}} {
		t.Run(map[bool]string{false: "root", true: "rootless"}[u.rootless], func(t *testing.T) {
			n := newTopology(t)
			before := snapshot(t, n)
			t.Cleanup(func() { before.compare(t, n) })
			suite(t, n, u)
		})
	}
}

// runCommand runs `slipway run --name NAME -- args...` to its end.
func runCommand(t testing.TB, n *topo.Topology, u user, args ...string) result {
	t.Helper()
	return finish(t, n.Host, u.slipway(append([]string{"run", "--name", newName(), "--"}, args...)...), 30*time.Second)
}

// TestExitStatus: the command's own status; 126 and 127 as shells have it; 125 for
// our own failures, with one line that says what, which and why.
func TestExitStatus(t *testing.T) {
	plain := runTmp + "/not-executable"
	eachUser(t, func(t *testing.T, n *topo.Topology, u user) {
		if err := os.WriteFile(plain, []byte("text"), 0o644); err != nil {
			t.Fatal(err)
		}
		defer os.Remove(plain)
		for _, tt := range []struct {
			args []string
			code int
			ours bool // slipway speaks, not the command
		}{
			{[]string{"true"}, 0, false},
			{[]string{"sh", "-c", "exit 7"}, 7, false},
			{[]string{"sh", "-c", "kill -TERM $$"}, 128 + 15, false},
			{[]string{"sh", "-c", "kill -KILL $$"}, 128 + 9, false},
			{[]string{"no-such-command"}, 127, true},
			{[]string{"/no/such/command"}, 127, true},
			{[]string{plain}, 126, true},
			{[]string{"/etc"}, 126, true},
		} {
			r := runCommand(t, n, u, tt.args...)
			if r.code != tt.code {
				t.Errorf("%v: status %d, expected %d\n%s", tt.args, r.code, tt.code, r.stderr)
			}
			if tt.ours != strings.HasPrefix(r.stderr, "slipway: ") {
				t.Errorf("%v: stderr %q", tt.args, r.stderr)
			}
		}
	})
}

// TestUserErrors: each mistake gets one line, perhaps a hint, and status 125.
func TestUserErrors(t *testing.T) {
	eachUser(t, func(t *testing.T, n *topo.Topology, u user) {
		broken := runTmp + "/broken.toml"
		if err := os.WriteFile(broken, []byte("mtu = 12\nno_such_key = 1\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		defer os.Remove(broken)
		for _, args := range [][]string{
			{"run", "--no-such-flag", "--", "true"},
			{"run"},
			{"run", "--name", "../escape", "--", "true"},
			{"run", "--name", strings.Repeat("x", 300), "--", "true"},
			{"run", "--path", "teleport", "--", "true"},
			{"run", "--isolate", "everything", "--", "true"},
			{"run", "--host-access", "99999", "--", "true"},
			{"run", "--config", "/no/such/file.toml", "--", "true"},
			{"run", "--config", broken, "--", "true"},
			{"exec", "no-such-engine", "--", "true"},
			{"status", "no-such-engine"},
			{"flows", "no-such-engine"},
			{"attach", "--pid", "999999"},
			{"attach", "--netns", "/no/such/namespace"},
			{"attach", "--netns", "/etc/passwd"},
			{"attach"},
			{"no-such-command"},
		} {
			r := finish(t, n.Host, u.slipway(args...), 15*time.Second)
			if r.code != 125 {
				t.Errorf("slipway %s: status %d, expected 125", strings.Join(args, " "), r.code)
			}
			if problem := badMessage(r.stderr); problem != "" {
				t.Errorf("slipway %s: %s:\n%s", strings.Join(args, " "), problem, r.stderr)
			}
		}
	})
}

// TestUnreadableConfig: a file that the user may not read is named.
func TestUnreadableConfig(t *testing.T) {
	eachUser(t, func(t *testing.T, n *topo.Topology, u user) {
		file := runTmp + "/secret.toml"
		if err := os.WriteFile(file, nil, 0); err != nil {
			t.Fatal(err)
		}
		defer os.Remove(file)
		r := finish(t, n.Host, u.slipway("run", "--config", file, "--", "true"), 15*time.Second)
		want := 0 // root reads everything
		if u.rootless && isRoot() {
			want = 125
		}
		if r.code != want || want != 0 && (badMessage(r.stderr) != "" || !strings.Contains(r.stderr, file)) {
			t.Errorf("status %d, expected %d: %s", r.code, want, r.stderr)
		}
	})
}

// TestStrangeStateDirectory: a state directory that is not ours is not used, nor
// removed.
func TestStrangeStateDirectory(t *testing.T) {
	eachUser(t, func(t *testing.T, n *topo.Topology, u user) {
		name := newName()
		dir := u.stateDir() + "/" + name
		script := "mkdir -m 700 -p " + u.stateDir() + " && umask 077 && echo precious >" + dir
		cmd := exec.Command(lookPath(t, "sh"), "-c", script)
		u.dress(cmd)
		if r := finish(t, n.Host, cmd, 15*time.Second); r.code != 0 {
			t.Fatal(r.stderr)
		}
		defer os.Remove(dir)
		r := finish(t, n.Host, u.slipway("run", "--name", name, "--", "true"), 15*time.Second)
		if r.code != 125 || badMessage(r.stderr) != "" {
			t.Errorf("a file in its place: status %d: %s", r.code, r.stderr)
		}
		if text, _ := os.ReadFile(dir); string(text) != "precious\n" {
			t.Error("the file was changed")
		}
	})
}

// TestNoUserNamespaces: where the system allows none, a rootless run says so and
// what to do.
func TestNoUserNamespaces(t *testing.T) {
	eachUser(t, func(t *testing.T, n *topo.Topology, u user) {
		script := "echo 0 > /proc/sys/user/max_user_namespaces && exec \"$@\""
		cmd := exec.Command(lookPath(t, "unshare"), "-U", "--map-root-user", "sh", "-c", script, "sh",
			os.Getenv(envBin), "run", "--rootless", "--", "true")
		u.dress(cmd)
		cmd.Env = append(cmd.Env, "XDG_RUNTIME_DIR="+runTmp)
		r := finish(t, n.Host, cmd, 15*time.Second)
		if r.code != 125 || badMessage(r.stderr) != "" || !strings.Contains(r.stderr, "hint: ") {
			t.Errorf("status %d: %s", r.code, r.stderr)
		}
	})
}

// TestDemo is what make run does: every check passes, without a terminal.
func TestDemo(t *testing.T) {
	eachUser(t, func(t *testing.T, n *topo.Topology, u user) {
		for range 2 { // a check has 2 s, and a busy machine stalls now and then
			r := finish(t, n.Host, u.slipway("demo"), 60*time.Second)
			if r.code == 0 {
				return
			}
			t.Logf("status %d\n%s%s", r.code, r.stdout, r.stderr)
		}
		t.Error("a check failed twice")
	})
}

// badMessage says what is wrong with an error message: it is to be a line
// "slipway: ..." for each problem, perhaps with a line "hint: ..." after it.
func badMessage(s string) string {
	lines := strings.Split(strings.TrimSuffix(s, "\n"), "\n")
	switch {
	case !strings.HasPrefix(lines[0], "slipway: "):
		return "does not begin with slipway"
	case len(lines) > 4:
		return "too long"
	case strings.Contains(s, "goroutine") || strings.Contains(s, "Usage:"):
		return "more than a message"
	}
	for _, l := range lines[1:] {
		if !strings.HasPrefix(l, "slipway: ") && !strings.HasPrefix(l, "hint: ") {
			return "a line that is neither message nor hint"
		}
	}
	return ""
}

// TestNameTaken: a second engine of the same name is refused and does the first
// no harm.
func TestNameTaken(t *testing.T) {
	eachUser(t, func(t *testing.T, n *topo.Topology, u user) {
		e := startEngine(t, n, engineOptions{user: u})
		r := finish(t, n.Host, u.slipway("run", "--name", e.name, "--", "true"), 10*time.Second)
		if r.code != 125 || badMessage(r.stderr) != "" || !strings.Contains(r.stderr, e.name) {
			t.Errorf("status %d: %s", r.code, r.stderr)
		}
		if r := e.exec(t, "true"); r.code != 0 {
			t.Errorf("the first engine, after: status %d: %s", r.code, r.stderr)
		}
	})
}

// TestListings: ls, status and flows know the engine, as text and as one JSON
// document.
func TestListings(t *testing.T) {
	eachUser(t, func(t *testing.T, n *topo.Topology, u user) {
		e := startEngine(t, n, engineOptions{user: u})
		for _, args := range [][]string{{"ls"}, {"status", e.name}, {"flows"}} {
			r := e.call(t, args...)
			if r.code != 0 || args[0] != "flows" && !strings.Contains(r.stdout, e.name) {
				t.Errorf("%v: status %d\n%s%s", args, r.code, r.stdout, r.stderr)
			}
			r = e.call(t, append(args, "--json")...)
			var any any
			if err := json.Unmarshal([]byte(r.stdout), &any); err != nil || r.code != 0 {
				t.Errorf("%v --json: status %d, %v\n%s%s", args, r.code, err, r.stdout, r.stderr)
			}
		}
		for _, name := range []string{"api.sock", "."} {
			st, err := os.Stat(e.stateDir() + "/" + e.name + "/" + name)
			if err != nil || st.Mode().Perm()&0o077 != 0 {
				t.Errorf("%s of the state directory: %v, %v", name, st, err)
			}
		}
	})
}

// TestExec runs commands in a running engine: same namespaces, own status, stdio.
func TestExec(t *testing.T) {
	eachUser(t, func(t *testing.T, n *topo.Topology, u user) {
		e := startEngine(t, n, engineOptions{user: u})
		r := e.exec(t, "sh", "-c", "readlink /proc/self/ns/net; echo err >&2; exit 5")
		if want := fmt.Sprintf("net:[%d]\n", e.guest.Inode()); r.code != 5 || r.stdout != want || r.stderr != "err\n" {
			t.Errorf("status %d, stdout %q, stderr %q, expected 5, %q", r.code, r.stdout, r.stderr, want)
		}
		cmd := u.slipway("exec", e.name, "--", "cat")
		cmd.Stdin = strings.NewReader("through")
		if r := finish(t, n.Host, cmd, 10*time.Second); r.stdout != "through" || r.code != 0 {
			t.Errorf("cat: status %d, %q %q", r.code, r.stdout, r.stderr)
		}
		if r := e.exec(t, "no-such-command"); r.code != 127 || badMessage(r.stderr) != "" {
			t.Errorf("no such command: status %d: %s", r.code, r.stderr)
		}
		if r := e.exec(t, "/etc/passwd"); r.code != 126 || badMessage(r.stderr) != "" {
			t.Errorf("not executable: status %d: %s", r.code, r.stderr)
		}
		for _, ns := range []string{"mnt", "user", "pid"} {
			link := "/proc/self/ns/" + ns
			inside, _ := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", e.pid, ns))
			if r := e.exec(t, "readlink", link); strings.TrimSpace(r.stdout) != inside {
				t.Errorf("exec is in %s, the command in %s", r.stdout, inside)
			}
		}
	})
}

// TestAPIRefused: who is inside an engine cannot use its control socket.
func TestAPIRefused(t *testing.T) {
	need(t, "curl")
	eachUser(t, func(t *testing.T, n *topo.Topology, u user) {
		e := startEngine(t, n, engineOptions{user: u})
		sock := e.stateDir() + "/" + e.name + "/api.sock"
		curl := []string{"curl", "-sS", "-m", "20", "-o", "/dev/null", "-w", "%{http_code}", "--unix-socket", sock}
		outside := func(more ...string) string {
			cmd := exec.Command(lookPath(t, "curl"), append(curl[1:], more...)...)
			u.dress(cmd)
			return finish(t, n.Host, cmd, 30*time.Second).stdout
		}
		const url = "http://slipway.internal/v1/status"
		if s := outside(url); s != "200" {
			t.Errorf("the owner gets %s", s)
		}
		if s := outside("-H", "Origin: http://example.org", url); s != "403" {
			t.Errorf("a browser gets %s", s)
		}
		if s := outside("http://example.org/v1/status"); s != "403" {
			t.Errorf("a strange Host gets %s", s)
		}
		if r := e.exec(t, append(curl, url)...); r.code == 0 && r.stdout != "403" {
			t.Errorf("the engine itself gets %s", r.stdout)
		}
	})
}

// TestSignals: what arrives at slipway arrives at the command.
func TestSignals(t *testing.T) {
	eachUser(t, func(t *testing.T, n *topo.Topology, u user) {
		for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGINT} {
			cmd, out := startScript(t, n, u, fmt.Sprintf("trap 'echo got; exit 3' %d; echo ready; while :; do sleep 0.02; done", int(sig)))
			expectLine(t, out, "ready")
			cmd.Process.Signal(sig)
			expectLine(t, out, "got")
			if code := waitFor(t, cmd); code != 3 {
				t.Errorf("%v: status %d, expected 3", sig, code)
			}
		}
	})
}

// TestSecondTermKills: a command that does not want to end is ended.
func TestSecondTermKills(t *testing.T) {
	eachUser(t, func(t *testing.T, n *topo.Topology, u user) {
		cmd, out := startScript(t, n, u, "trap 'echo no' TERM; echo ready; while :; do sleep 0.02; done")
		expectLine(t, out, "ready")
		cmd.Process.Signal(syscall.SIGTERM)
		expectLine(t, out, "no")
		cmd.Process.Signal(syscall.SIGTERM)
		if code := waitFor(t, cmd); code != 128+9 {
			t.Errorf("status %d, expected %d", code, 128+9)
		}
	})
}

// startScript runs a shell script in an engine; out is its standard output.
func startScript(t testing.TB, n *topo.Topology, u user, script string) (*exec.Cmd, *bufio.Reader) {
	t.Helper()
	cmd := u.slipway("run", "--name", newName(), "--", "sh", "-c", script)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := n.Host.Start(cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if cmd.ProcessState == nil {
			cmd.Process.Kill()
			cmd.Wait()
		}
	})
	return cmd, bufio.NewReader(out)
}

func expectLine(t testing.TB, r *bufio.Reader, want string) {
	t.Helper()
	line := make(chan string, 1)
	go func() {
		s, err := r.ReadString('\n')
		if err != nil && err != io.EOF {
			s += err.Error()
		}
		line <- strings.TrimRight(s, "\r\n")
	}()
	if s := receive(t, line); s != want {
		t.Fatalf("read %q, expected %q", s, want)
	}
}

// waitFor waits for cmd, 15 s at most, less than stop_timeout, and returns its status.
func waitFor(t testing.TB, cmd *exec.Cmd) int {
	t.Helper()
	timer := time.AfterFunc(15*time.Second, func() { cmd.Process.Kill() })
	cmd.Wait()
	if !timer.Stop() {
		t.Errorf("%v did not end within 15 s", cmd.Args)
	}
	return status(cmd.ProcessState)
}

// TestMissingTUN: a host without the device says so.
func TestMissingTUN(t *testing.T) {
	eachUser(t, func(t *testing.T, n *topo.Topology, u user) {
		script := "mount -t tmpfs none /dev/net && exec \"$@\""
		cmd := exec.Command(lookPath(t, "unshare"), append([]string{"-m", "sh", "-c", script, "sh"}, withUser(u, "run", "--", "true")...)...)
		r := finish(t, n.Host, cmd, 15*time.Second)
		if r.code != 125 || badMessage(r.stderr) != "" || !strings.Contains(r.stderr, "/dev/net/tun") {
			t.Errorf("status %d: %s", r.code, r.stderr)
		}
	})
}

// withUser returns a slipway command line for a shell: setpriv changes the user.
func withUser(u user, args ...string) []string {
	cmd := u.slipway(args...)
	env := append([]string{"env", "-i"}, cmd.Env...)
	line := append(env, cmd.Args...)
	if cmd.SysProcAttr != nil && cmd.SysProcAttr.Credential != nil {
		id := fmt.Sprint(ordinaryUser)
		line = append([]string{"setpriv", "--reuid", id, "--regid", id, "--clear-groups"}, line...)
	}
	return line
}
