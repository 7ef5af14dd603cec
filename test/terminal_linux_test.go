package test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	"github.com/slipway-net/slipway/test/topo"
)

// terminal is a person in front of a slipway command.
type terminal struct {
	t    testing.TB
	cmd  *exec.Cmd
	file *os.File
	out  log
	seen int // how much of out was expected already
	done chan struct{}
}

// openTerminal runs cmd on a terminal of its own, 80 by 24.
func openTerminal(t testing.TB, n *topo.Topology, cmd *exec.Cmd) *terminal {
	t.Helper()
	term := &terminal{t: t, cmd: cmd, done: make(chan struct{})}
	err := n.Host.Do(func() (err error) {
		term.file, err = pty.StartWithSize(cmd, &pty.Winsize{Rows: 24, Cols: 80})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(term.done)
		buf := make([]byte, 4096)
		for {
			k, err := term.file.Read(buf)
			term.out.Write(buf[:k])
			if err != nil { // EIO: nobody has the other side open
				return
			}
		}
	}()
	t.Cleanup(func() {
		if cmd.ProcessState == nil {
			cmd.Process.Kill()
			cmd.Wait()
		}
		term.file.Close()
		<-term.done
	})
	return term
}

func (term *terminal) types(s string) { term.file.WriteString(s) }

// expect waits for text after what was expected before.
func (term *terminal) expect(text string) {
	term.t.Helper()
	if !eventually(20*time.Second, func() bool {
		i := strings.Index(term.out.String()[term.seen:], text)
		if i >= 0 {
			term.seen += i + len(text)
		}
		return i >= 0
	}) {
		term.t.Fatalf("the terminal does not show %q after\n%s\n---- but\n%s", text, term.out.String()[:term.seen], term.out.String()[term.seen:])
	}
}

// eachTerminal runs the suite with a command of `run` and of `exec`.
func eachTerminal(t *testing.T, suite func(t *testing.T, n *topo.Topology, command func(args ...string) *exec.Cmd)) {
	eachUser(t, func(t *testing.T, n *topo.Topology, u user) {
		t.Run("run", func(t *testing.T) {
			suite(t, n, func(args ...string) *exec.Cmd {
				return u.slipway(append([]string{"run", "--name", newName(), "--"}, args...)...)
			})
		})
		t.Run("exec", func(t *testing.T) {
			e := startEngine(t, n, engineOptions{user: u})
			suite(t, n, func(args ...string) *exec.Cmd {
				return u.slipway(append([]string{"exec", e.name, "--"}, args...)...)
			})
		})
	})
}

// TestCtrlC: an interrupt goes to the command once, and slipway outlives it.
func TestCtrlC(t *testing.T) {
	eachTerminal(t, func(t *testing.T, n *topo.Topology, command func(...string) *exec.Cmd) {
		cmd := command("sh", "-c", `trap 'echo "<got>"; n=$((n+1))' INT; n=0; echo "<ready>"; i=0
			while [ $i -lt 30 ]; do sleep 0.02; [ $n -gt 0 ] && i=$((i+1)); done; echo "<$n>"; exit 3`)
		term := openTerminal(t, n, cmd)
		term.expect("<ready>")
		term.types("\x03")
		term.expect("<got>")
		term.expect("<1>")
		if code := waitFor(t, cmd); code != 3 {
			t.Errorf("status %d, expected 3", code)
		}
	})
}

// TestWindowSize: the command sees the terminal's size and its changes.
func TestWindowSize(t *testing.T) {
	eachTerminal(t, func(t *testing.T, n *topo.Topology, command func(...string) *exec.Cmd) {
		cmd := command("sh", "-c", `trap 'echo "<$(stty size)>"; exit 4' WINCH; echo "<$(stty size)>"; while :; do sleep 0.02; done`)
		term := openTerminal(t, n, cmd)
		term.expect("<24 80>")
		if err := pty.Setsize(term.file, &pty.Winsize{Rows: 50, Cols: 132}); err != nil {
			t.Fatal(err)
		}
		term.expect("<50 132>")
		if code := waitFor(t, cmd); code != 4 {
			t.Errorf("status %d, expected 4", code)
		}
	})
}

// TestJobControl: an interactive bash can stop, list and continue jobs.
func TestJobControl(t *testing.T) {
	need(t, "bash")
	eachTerminal(t, func(t *testing.T, n *topo.Topology, command func(...string) *exec.Cmd) {
		cmd := command("bash", "--norc", "--noprofile", "-i")
		term := openTerminal(t, n, cmd)
		term.types("PS1=; echo \"<sh\"\"ell>\"\n")
		term.expect("<shell>")
		term.types("sleep 1234\n")
		waitForeground(t, "sleep", "1234")
		term.types("\x1a")
		term.expect("Stopped")
		term.types("jobs; echo \"<lis\"\"ted>\"\n")
		term.expect("sleep 1234")
		term.expect("<listed>")
		term.types("fg\n")
		term.expect("sleep 1234")
		waitForeground(t, "sleep", "1234")
		term.types("\x03")
		term.types("echo \"<ba\"\"ck>\"\n")
		term.expect("<back>")
		term.types("exit 6\n")
		if code := waitFor(t, cmd); code != 6 {
			t.Errorf("status %d, expected 6", code)
		}
		if s := term.out.String(); strings.Contains(s, "no job control") {
			t.Errorf("bash complains: %s", s)
		}
	})
}

// waitForeground waits until the process with these arguments sleeps as the
// foreground process group of its terminal.
func waitForeground(t testing.TB, args ...string) {
	t.Helper()
	want := strings.Join(args, "\x00") + "\x00"
	if !eventually(20*time.Second, func() bool {
		all, _ := filepath.Glob("/proc/[0-9]*")
		for _, dir := range all {
			if cmdline, err := os.ReadFile(dir + "/cmdline"); err != nil || string(cmdline) != want {
				continue
			}
			stat, _ := os.ReadFile(dir + "/stat")
			_, rest, _ := strings.Cut(string(stat), ") ")
			// state ppid pgrp session tty_nr tpgid, proc_pid_stat(5)
			if f := strings.Fields(rest); len(f) > 5 && f[0] == "S" && f[2] == f[5] {
				return true
			}
		}
		return false
	}) {
		t.Fatalf("%v does not run in the foreground", args)
	}
}

// TestTerminalRestored: whatever the command did to the terminal's mode is undone
// by nobody, as without slipway, but slipway itself leaves it alone.
func TestTerminalRestored(t *testing.T) {
	eachTerminal(t, func(t *testing.T, n *topo.Topology, command func(...string) *exec.Cmd) {
		inner := command("true")
		script := fmt.Sprintf("a=$(stty -g); %s; s=$?; b=$(stty -g); [ \"$a\" = \"$b\" ] && echo \"<sa\"\"me $s>\" || echo \"<$a $b>\"", strings.Join(inner.Args, " "))
		cmd := exec.Command(lookPath(t, "sh"), "-c", script)
		cmd.Env, cmd.Dir, cmd.SysProcAttr = inner.Env, inner.Dir, inner.SysProcAttr
		if cmd.SysProcAttr == nil {
			cmd.SysProcAttr = new(syscall.SysProcAttr)
		}
		term := openTerminal(t, n, cmd)
		term.expect("<same 0>")
	})
}
