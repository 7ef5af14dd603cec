package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"
)

// terminal is a command on a terminal of its own, and what the screen shows.
type terminal struct {
	t      *testing.T
	cmd    *exec.Cmd
	master *os.File

	mu     sync.Mutex // guards screen
	screen bytes.Buffer
}

// onTerminal starts slipway as a user's shell would.
func onTerminal(t *testing.T, args ...string) *terminal {
	t.Helper()
	cmd := command(t, args...)
	cmd.Env = append(os.Environ(), "PS1=$ ", "ENV=", "TERM=dumb")
	master, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: 33, Cols: 77})
	if err != nil {
		t.Fatal(err)
	}
	s := &terminal{t: t, cmd: cmd, master: master}
	shown := make(chan struct{})
	go func() {
		defer close(shown)
		io.Copy(s, master) // until EIO: nobody has the other end any more
	}()
	t.Cleanup(func() {
		cmd.Process.Kill() // fails when it has ended
		master.Close()
		<-shown
	})
	return s
}

// Write implements io.Writer: it is the screen.
func (s *terminal) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.screen.Write(b)
}

func (s *terminal) shows() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.screen.String()
}

// await waits until the screen shows text.
func (s *terminal) await(text string) {
	s.t.Helper()
	for deadline := time.Now().Add(limit); !strings.Contains(s.shows(), text); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			s.t.Fatalf("%q does not appear on the screen:\n%s", text, s.shows())
		}
	}
}

func (s *terminal) types(text string) {
	s.t.Helper()
	if _, err := io.WriteString(s.master, text); err != nil {
		s.t.Fatal(err)
	}
}

// end waits for the command's end.
func (s *terminal) end() int {
	s.t.Helper()
	timer := time.AfterFunc(limit, func() { s.cmd.Process.Kill() })
	defer timer.Stop()
	if err := s.cmd.Wait(); err != nil && !errors.As(err, new(*exec.ExitError)) {
		s.t.Fatal(err)
	}
	return code(s.cmd)
}

// A shell in the engine is the terminal's own: Ctrl-C ends its job and not the shell,
// Ctrl-Z stops a job that fg takes up again.
func TestRunOnTerminal(t *testing.T) {
	needEngines(t)
	s := onTerminal(t, "run", "--name", "tty", "--", "sh", "-i")
	s.types("stty size; stty -echo; echo rea''dy\n")
	s.await("33 77")
	s.await("ready")
	s.types("echo st''art; sleep 100; echo code $?\n")
	s.await("start")
	eventuallyForeground(t, s, "sleep")
	s.types("\x03")
	s.types("echo al''ive\n")
	s.await("alive")
	s.types("sleep 100\n")
	eventuallyForeground(t, s, "sleep")
	s.types("\x1a")
	s.types("jobs; echo jo''bs\n")
	s.await("Stopped")
	s.await("jobs")
	s.types("fg\n")
	eventuallyForeground(t, s, "sleep")
	s.types("\x03")
	s.types("exit 4\n")
	if got := s.end(); got != 4 {
		t.Errorf("status %d\n%s", got, s.shows())
	}
	nothingLeft(t)
}

// eventuallyForeground waits until a program of that name has the terminal.
func eventuallyForeground(t *testing.T, s *terminal, name string) {
	t.Helper()
	eventually(t, name+" is in the foreground", func() bool {
		pgrp, err := unix.IoctlGetInt(int(s.master.Fd()), unix.TIOCGPGRP)
		if err != nil {
			return false
		}
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pgrp))
		return err == nil && strings.TrimSpace(string(b)) == name
	})
}

// Ctrl-C reaches the command once, from the terminal, and not a second time from us.
func TestInterruptOnTerminal(t *testing.T) {
	needEngines(t)
	s := onTerminal(t, "run", "--", "sh", "-c", "trap 'echo int' INT; trap 'exit 3' TERM; echo ready; while :; do sleep 0.01; done")
	s.await("ready")
	s.types("\x03")
	s.await("int")
	s.cmd.Process.Signal(unix.SIGINT) // ours alone: not passed on
	s.cmd.Process.Signal(unix.SIGTERM)
	if got := s.end(); got != 3 {
		t.Errorf("status %d", got)
	}
	if n := strings.Count(s.shows(), "int"); n != 1 {
		t.Errorf("%d interrupts:\n%s", n, s.shows())
	}
}

// Ctrl-C before there is a command ends slipway, which then has none to leave it to.
func TestInterruptDuringStart(t *testing.T) {
	needEngines(t)
	for i := range 10 {
		s := onTerminal(t, "run", "--name", "early", "--", "sleep", "60")
		eventually(t, "it has begun", func() bool { _, err := os.Stat("/run/slipway/early"); return err == nil })
		time.Sleep(time.Duration(i) * 4 * time.Millisecond)
		s.types("\x03")
		if got := s.end(); got != 128+int(unix.SIGINT) {
			t.Errorf("status %d: %s", got, s.shows())
		}
	}
	nothingLeft(t)
}

func TestExecOnTerminal(t *testing.T) {
	needEngines(t)
	e := start(t, "ex", "run", "--name", "ex", "--", "sleep", "60")
	s := onTerminal(t, "exec", "ex", "--", "sh", "-i")
	s.types("stty size; stty -echo; echo rea''dy\n")
	s.await("33 77")
	s.await("ready")
	s.types("trap 'stty size' WINCH\n")
	if err := pty.Setsize(s.master, &pty.Winsize{Rows: 44, Cols: 88}); err != nil {
		t.Fatal(err)
	}
	s.types("sleep 0.1; stty size\n")
	s.await("44 88")
	// The job itself says that it runs: the shell has given it the terminal by then.
	s.types("sh -c 'echo st\"\"art; exec sleep 100'\n")
	s.await("start")
	s.types("\x03")
	s.types("echo al''ive; tty\n")
	s.await("alive")
	s.types("exit 6\n")
	if got := s.end(); got != 6 {
		t.Errorf("status %d\n%s", got, s.shows())
	}
	state, err := unix.IoctlGetTermios(int(s.master.Fd()), unix.TCGETS)
	if err != nil || state.Lflag&unix.ICANON == 0 || state.Lflag&unix.ECHO == 0 {
		t.Errorf("the terminal is left raw: %+v, %v", state, err)
	}
	e.Process.Signal(unix.SIGTERM)
	e.end(t)
	nothingLeft(t)
}

// What a command says last is shown, though its end comes by another way.
func TestExecShowsAll(t *testing.T) {
	needEngines(t)
	e := start(t, "all", "run", "--name", "all", "--", "sleep", "60")
	s := onTerminal(t, "exec", "all", "--", "sh", "-c", "i=0; while [ $i -lt 5000 ]; do echo line $i; i=$((i+1)); done; echo the end")
	if got := s.end(); got != 0 {
		t.Errorf("status %d", got)
	}
	s.await("line 4999\r\nthe end\r\n")
	e.Process.Signal(unix.SIGTERM)
	e.end(t)
}

// A terminal that is slow to show it loses nothing of what a command has written.
func TestSlowScreen(t *testing.T) {
	master, slave, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	shown, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer shown.Close()
	raw, err := w.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	const full = 4096
	raw.Control(func(fd uintptr) { _, err = unix.FcntlInt(fd, unix.F_SETPIPE_SZ, full) })
	if err != nil {
		t.Fatal(err)
	}
	written := bytes.Repeat([]byte("x"), 6000) // more than is read at one time; a terminal holds 8192 bytes that nobody reads
	for f, size := range map[*os.File]int{w: full, slave: len(written)} {
		if _, err := f.Write(written[:size]); err != nil {
			t.Fatal(err)
		}
	}
	slave.Close()
	stdout := os.Stdout
	os.Stdout = w
	s := startScreen(master)
	finished := make(chan struct{})
	go func() {
		defer close(finished)
		s.finish()
		w.Close()
	}()
	time.Sleep(2 * lastOutput)
	b, err := io.ReadAll(shown)
	<-finished
	os.Stdout = stdout
	if want := full + len(written); err != nil || len(b) != want {
		t.Errorf("%d bytes were shown, %v, want %d", len(b), err, want)
	}
}
