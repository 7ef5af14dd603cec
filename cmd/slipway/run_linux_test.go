package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestExitStatus(t *testing.T) {
	needEngines(t)
	dir := t.TempDir()
	plain := filepath.Join(dir, "plain")
	if err := os.WriteFile(plain, []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name   string
		args   []string
		want   int
		stderr string
	}{
		{"success", []string{"true"}, 0, ""},
		{"failure", []string{"false"}, 1, ""},
		{"any", []string{"sh", "-c", "exit 42"}, 42, ""},
		{"signal", []string{"sh", "-c", "kill -USR1 $$"}, 128 + int(syscall.SIGUSR1), ""},
		{"not found", []string{"no-such-program"}, 127, "slipway: exec on no-such-program: not found in PATH\n"},
		{"no such file", []string{filepath.Join(dir, "none")}, 127, "no such file"},
		{"not executable", []string{plain}, 126, "permission denied"},
		{"a directory", []string{dir}, 126, "slipway: exec on " + dir},
	}
	for _, flags := range [][]string{nil, {"--rootless"}, {"--isolate", "net,mount,pid"}} {
		for _, tt := range tests {
			t.Run(strings.Join(append(flags, tt.name), " "), func(t *testing.T) {
				r := slipway(t, append(append(append([]string{"run"}, flags...), "--"), tt.args...)...)
				if r.code != tt.want || !strings.Contains(r.stderr, tt.stderr) || tt.stderr == "" && r.stderr != "" {
					t.Errorf("status %d, want %d; stderr %q", r.code, tt.want, r.stderr)
				}
				nothingLeft(t)
			})
		}
	}
}

func TestRunWithoutDashes(t *testing.T) {
	needEngines(t)
	if r := slipway(t, "run", "sh", "-c", "echo $0 $1", "--name", "x"); r.stdout != "--name x\n" {
		t.Errorf("stdout %q, stderr %q", r.stdout, r.stderr)
	}
}

func TestNameIsTaken(t *testing.T) {
	needEngines(t)
	e := start(t, "one", "run", "--name", "one", "--", "sleep", "60")
	r := slipway(t, "run", "--name", "one", "--", "true")
	if r.code != 125 || !strings.Contains(r.stderr, "one: already running\nhint: ") {
		t.Errorf("status %d, stderr %q", r.code, r.stderr)
	}
	if r := slipway(t, "exec", "one", "--", "true"); r.code != 0 {
		t.Errorf("the first one does not answer any more: %s", r.stderr)
	}
	e.Process.Signal(unix.SIGTERM)
	e.end(t)
}

// While an engine runs its directory has what DESIGN section 7 says, and afterwards
// nothing is there.
func TestStateDirectory(t *testing.T) {
	needEngines(t)
	e := start(t, "files", "run", "--name", "files", "--", "sleep", "60")
	dir := "/run/slipway/files"
	for name, mode := range map[string]os.FileMode{
		"": os.ModeDir | 0o700, "api.sock": os.ModeSocket | 0o600, "netns": os.ModeSymlink | 0o777, "pid": 0o644, "resolv.conf": 0o644, "hosts": 0o644,
	} {
		info, err := os.Lstat(filepath.Join(dir, name))
		if err != nil || info.Mode() != mode {
			t.Errorf("%s: %v, %v; want mode %v", name, info, err, mode)
		}
	}
	if b, err := os.ReadFile(filepath.Join(dir, "pid")); err != nil || string(b) != fmt.Sprintf("%d\n", e.Process.Pid) {
		t.Errorf("pid %q, %v", b, err)
	}
	inside := slipway(t, "exec", "files", "--", "readlink", "/proc/self/ns/net").stdout
	if to, err := os.Stat(filepath.Join(dir, "netns")); err != nil || inside != fmt.Sprintf("net:[%d]\n", to.Sys().(*syscall.Stat_t).Ino) {
		t.Errorf("netns is not the engine's: %v", err)
	}
	e.Process.Signal(unix.SIGTERM)
	e.end(t)
	nothingLeft(t)
}

func TestSignalsArePassedOn(t *testing.T) {
	needEngines(t)
	for _, sig := range []syscall.Signal{unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2, unix.SIGWINCH, unix.SIGINT} {
		t.Run(sig.String(), func(t *testing.T) {
			ready := filepath.Join(t.TempDir(), "ready")
			e := start(t, "sig", "run", "--name", "sig", "--", "sh", "-c",
				fmt.Sprintf("trap 'exit 9' %d; >%s; while :; do sleep 0.01; done", int(sig), ready))
			eventually(t, "the command is ready", func() bool { _, err := os.Stat(ready); return err == nil })
			e.Process.Signal(sig)
			if got := e.end(t); got != 9 {
				t.Errorf("status %d, stderr %s", got, e.stderr.String())
			}
			nothingLeft(t)
		})
	}
}

// stubborn is a command that does not mind TERM.
func stubborn(ready string) []string {
	return []string{"sh", "-c", "trap '' TERM; >" + ready + "; while :; do sleep 0.01; done"}
}

func TestSecondTermKills(t *testing.T) {
	needEngines(t)
	ready := filepath.Join(t.TempDir(), "ready")
	e := start(t, "two", append([]string{"run", "--name", "two", "--"}, stubborn(ready)...)...)
	eventually(t, "the command is ready", func() bool { _, err := os.Stat(ready); return err == nil })
	began := time.Now()
	e.Process.Signal(unix.SIGTERM)
	// Two signals of a kind that wait are one: the second may come when the first
	// has been read, which the signal to the command shows.
	eventually(t, "the first TERM is passed on", func() bool {
		e.Process.Signal(unix.SIGTERM)
		return unix.Kill(e.Process.Pid, 0) != nil || ended(e)
	})
	if got := e.end(t); got != 128+int(unix.SIGKILL) {
		t.Errorf("status %d", got)
	}
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("it took %v", took)
	}
	nothingLeft(t)
}

// ended reports whether the engine's process waits for us to notice its end.
func ended(e *started) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", e.Process.Pid))
	return err != nil || strings.Contains(string(b), ") Z ")
}

func TestStopTimeout(t *testing.T) {
	needEngines(t)
	dir := t.TempDir()
	file, ready := filepath.Join(dir, "c.toml"), filepath.Join(dir, "ready")
	if err := os.WriteFile(file, []byte("stop_timeout = \"200ms\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	e := start(t, "slow", append([]string{"run", "--config", file, "--name", "slow", "--"}, stubborn(ready)...)...)
	eventually(t, "the command is ready", func() bool { _, err := os.Stat(ready); return err == nil })
	e.Process.Signal(unix.SIGTERM)
	if got := e.end(t); got != 128+int(unix.SIGKILL) {
		t.Errorf("status %d", got)
	}
	if !strings.Contains(e.stderr.String(), "it is killed") {
		t.Errorf("nothing was said: %q", e.stderr.String())
	}
	nothingLeft(t)
}

// After kill -9 of the daemon the guest ends, and the next start clears what is left.
func TestKilledDaemon(t *testing.T) {
	needEngines(t)
	for _, flags := range [][]string{nil, {"--rootless"}, {"--isolate", "pid"}} {
		t.Run(strings.Join(flags, " "), func(t *testing.T) {
			e := start(t, "dead", append(append([]string{"run", "--name", "dead"}, flags...), "--", "sh", "-c", "sleep 60 & sleep 60")...)
			e.Process.Kill()
			e.end(t)
			eventually(t, "the guest ends", func() bool { return len(guests(t)) == 0 })
			eventually(t, "the agent, which is the last, ends", func() bool { return unlocked(t, "/run/slipway/dead/guest") })
			if _, err := os.Stat("/run/slipway/dead/lock"); err != nil {
				t.Errorf("no stale directory to test with: %v", err)
			}
			if r := slipway(t, "ls"); strings.Contains(r.stdout, "dead") || r.code != 0 {
				t.Errorf("ls: %s%s", r.stdout, r.stderr)
			}
			if r := slipway(t, "status", "dead"); !strings.Contains(r.stderr, "not running") {
				t.Errorf("status: %s", r.stderr)
			}
			if r := slipway(t, "run", "--name", "dead", "--", "true"); r.code != 0 || r.stderr != "" {
				t.Errorf("next run: status %d, %s", r.code, r.stderr)
			}
			nothingLeft(t)
		})
	}
}

// unlocked reports whether nobody has the lock of a file.
func unlocked(t *testing.T, path string) bool {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	return unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB) == nil
}

func TestUp(t *testing.T) {
	needEngines(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "c.toml")
	write := func(head string) {
		t.Helper()
		text := head + "[engine.web]\ncommand = [\"sh\", \"-c\", \"echo $A > out; exec sleep 60\"]\ndirectory = \"" + dir + "\"\nenvironment = {A = \"b c\"}\n"
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("")
	e := start(t, "web", "up", "--config", file)
	eventually(t, "the command has written", func() bool {
		b, err := os.ReadFile(filepath.Join(dir, "out"))
		return err == nil && string(b) == "b c\n"
	})
	write("log_level = \"info\"\nmtu = 1400\n")
	e.Process.Signal(unix.SIGHUP)
	write("log_level = \"loud\"\n")
	e.Process.Signal(unix.SIGHUP)
	e.Process.Signal(unix.SIGTERM)
	if got := e.end(t); got != 128+int(unix.SIGTERM) {
		t.Errorf("status %d", got)
	}
	if !strings.Contains(e.stderr.String(), "configuration") {
		t.Errorf("nothing was said about the configuration: %q", e.stderr.String())
	}
	nothingLeft(t)
}

func TestDemo(t *testing.T) {
	needEngines(t)
	for _, flags := range [][]string{nil, {"--rootless"}} {
		r := slipway(t, append([]string{"demo"}, flags...)...)
		if r.code != 0 || strings.Contains(r.stdout, "FAIL") || !strings.Contains(r.stdout, "16 KiB") {
			t.Errorf("demo %v: status %d\n%s%s", flags, r.code, r.stdout, r.stderr)
		}
		nothingLeft(t)
	}
}

func TestDoctor(t *testing.T) {
	needEngines(t)
	if r := slipway(t, "doctor"); r.code != 0 || !strings.Contains(r.stdout, "/dev/net/tun") {
		t.Errorf("status %d\n%s%s", r.code, r.stdout, r.stderr)
	}
}

// attach ends by itself, and well, when the namespace goes.
func TestAttach(t *testing.T) {
	needEngines(t)
	t.Run("process", func(t *testing.T) {
		guest := exec.CommandContext(t.Context(), "sleep", "60")
		guest.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
		if err := guest.Start(); err != nil {
			t.Fatal(err)
		}
		e := start(t, "att", "attach", "--pid", fmt.Sprint(guest.Process.Pid), "--name", "att")
		if r := slipway(t, "exec", "att", "--", "readlink", "/proc/self/ns/net"); r.code != 0 ||
			r.stdout != readlink(t, fmt.Sprintf("/proc/%d/ns/net", guest.Process.Pid))+"\n" {
			t.Errorf("exec: %+v", r)
		}
		again := slipway(t, "attach", "--pid", fmt.Sprint(guest.Process.Pid), "--name", "again")
		if again.code != 125 || !strings.Contains(again.stderr, "hint: ") {
			t.Errorf("a second attach: status %d, %s", again.code, again.stderr)
		}
		guest.Process.Kill()
		guest.Wait()
		if got := e.end(t); got != 0 {
			t.Errorf("status %d, %s", got, e.stderr.String())
		}
		nothingLeft(t)
	})
	t.Run("path", func(t *testing.T) {
		if out, err := exec.Command("ip", "netns", "add", "att").CombinedOutput(); err != nil {
			t.Fatalf("ip netns add: %v %s", err, out)
		}
		e := start(t, "att", "attach", "--netns", "/run/netns/att", "--name", "att")
		e.Process.Signal(unix.SIGTERM)
		if got := e.end(t); got != 0 {
			t.Errorf("status %d after TERM, %s", got, e.stderr.String())
		}
		e = start(t, "att", "attach", "--netns", "/run/netns/att", "--name", "att")
		if out, err := exec.Command("ip", "netns", "del", "att").CombinedOutput(); err != nil {
			t.Fatalf("ip netns del: %v %s", err, out)
		}
		if got := e.end(t); got != 0 {
			t.Errorf("status %d after the file went, %s", got, e.stderr.String())
		}
		nothingLeft(t)
	})
	t.Run("agent killed", func(t *testing.T) { // the namespace is still there: a service manager is to try again
		guest := exec.CommandContext(t.Context(), "sleep", "60")
		guest.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
		if err := guest.Start(); err != nil {
			t.Fatal(err)
		}
		e := start(t, "att", "attach", "--pid", fmt.Sprint(guest.Process.Pid), "--name", "att")
		agent, err := os.Readlink("/run/slipway/att/netns")
		var pid int
		if _, serr := fmt.Sscanf(agent, "/proc/%d/ns/net", &pid); err != nil || serr != nil {
			t.Fatal(agent, err, serr)
		}
		unix.Kill(pid, unix.SIGKILL)
		if got := e.end(t); got != 125 || !strings.Contains(e.stderr.String(), "slipway: serve engine att: the agent has ended\n") {
			t.Errorf("status %d, %s", got, e.stderr.String())
		}
		guest.Process.Kill()
		guest.Wait()
		nothingLeft(t)
	})
}

func readlink(t *testing.T, path string) string {
	t.Helper()
	to, err := os.Readlink(path)
	if err != nil {
		t.Fatal(err)
	}
	return to
}

// Without its device an engine is of no use: it ends, and says why.
func TestDeviceDeletedInside(t *testing.T) {
	needEngines(t)
	e := start(t, "del", "run", "--name", "del", "--", "sleep", "60")
	slipway(t, "exec", "del", "--", "ip", "link", "del", "slipway0") // may be ended with the engine
	if got := e.end(t); got != 125 || !strings.Contains(e.stderr.String(), "hint: somebody inside has deleted") {
		t.Errorf("status %d, %s", got, e.stderr.String())
	}
	nothingLeft(t)
}
