package test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/slipway-net/slipway/test/topo"
	"golang.org/x/sys/unix"
)

// user is who runs slipway: root, or an ordinary user (rootless). A test that
// runs unprivileged has only itself, root of a user namespace, and asks for a
// nested one with --rootless.
type user struct{ rootless bool }

// searchPath holds no directory that an ordinary user may not read, as the PATH of
// whoever runs the tests may.
const searchPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// slipway returns the command `slipway args...` of that user.
func (u user) slipway(args ...string) *exec.Cmd {
	if u.rootless && !isRoot() && len(args) > 0 && args[0] == "run" {
		args = append([]string{"run", "--rootless"}, args[1:]...)
	}
	cmd := exec.Command(os.Getenv(envBin), args...)
	u.dress(cmd)
	return cmd
}

// dress gives cmd the user's identity and environment.
func (u user) dress(cmd *exec.Cmd) {
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=" + searchPath, "TMPDIR=" + runTmp, "LANG=C.UTF-8", "TERM=xterm", "HOME=/run/user", "HISTFILE=/dev/null"}
	if !u.rootless || !isRoot() {
		return
	}
	home := fmt.Sprintf("/run/user/%d", ordinaryUser)
	cmd.Env = append(cmd.Env, "XDG_RUNTIME_DIR="+home, "HOME="+home)
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = new(syscall.SysProcAttr)
	}
	cmd.SysProcAttr.Credential = &syscall.Credential{Uid: ordinaryUser, Gid: ordinaryUser}
}

// stateDir is where the user's engines keep their state.
func (u user) stateDir() string {
	if u.rootless && isRoot() {
		return fmt.Sprintf("/run/user/%d/slipway", ordinaryUser)
	}
	return "/run/slipway"
}

// result is what a finished command said.
type result struct {
	stdout, stderr string
	code           int // exit status as a shell sees it
}

// finish runs cmd in ns with a deadline; a command that cannot start or does not
// end fails the test.
func finish(t testing.TB, ns *topo.NS, cmd *exec.Cmd, within time.Duration) result {
	t.Helper()
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	cmd.WaitDelay = 5 * time.Second
	if err := ns.Start(cmd); err != nil {
		t.Fatalf("start %v: %v", cmd.Args, err)
	}
	timer := time.AfterFunc(within, func() { cmd.Process.Kill() })
	err := cmd.Wait()
	if !timer.Stop() {
		t.Fatalf("%v did not end within %v\nstdout: %s\nstderr: %s", cmd.Args, within, out.String(), errOut.String())
	}
	if exit := new(exec.ExitError); err != nil && !errors.As(err, &exit) && !errors.Is(err, exec.ErrWaitDelay) {
		t.Fatalf("%v: %v", cmd.Args, err)
	}
	return result{out.String(), errOut.String(), status(cmd.ProcessState)}
}

// status returns the exit status as a shell shows it.
func status(s *os.ProcessState) int {
	if w, ok := s.Sys().(syscall.WaitStatus); ok && w.Signaled() {
		return 128 + int(w.Signal())
	}
	return s.ExitCode()
}

// log is a writer that many may read while it grows.
type log struct {
	mu   sync.Mutex
	buf  bytes.Buffer // guarded by mu
	file *os.File     // in its place, after open
}

// open makes it a file, which processes write to by themselves: what one has said is in it
// when that one has ended.
func (l *log) open() (*os.File, error) {
	if l.file == nil {
		fd, err := unix.MemfdCreate("log", unix.MFD_CLOEXEC)
		if err != nil {
			return nil, err
		}
		l.file = os.NewFile(uintptr(fd), "log")
	}
	return l.file, nil
}

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file != nil {
		return l.file.Write(p)
	}
	return l.buf.Write(p)
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file != nil {
		text, _ := io.ReadAll(io.NewSectionReader(l.file, 0, 1<<30))
		return string(text)
	}
	return l.buf.String()
}

// engine is a running `slipway run`.
type engine struct {
	user
	name   string
	net    *topo.Topology
	guest  *topo.NS // the engine's namespace
	cmd    *exec.Cmd
	stderr log
	pid    int // of CMD as the host sees it; 0 with its own pid namespace
	done   chan struct{}
	state  *os.ProcessState // set before done is closed

	config  string // the file of an engine that startUp started
	stdin   io.Closer
	ended   bool
	before  leftovers
	capture *topo.Capture
}

// engineOptions is how an engine is started; the zero value is the default.
type engineOptions struct {
	user
	name      string
	path      string // of --path; empty leaves the choice to slipway
	flags     []string
	noCapture bool // for what floods or is measured
}

// engines counts engines, for their names.
var engines struct {
	sync.Mutex
	n int
}

func newName() string {
	engines.Lock()
	defer engines.Unlock()
	engines.n++
	return fmt.Sprintf("t%d", engines.n)
}

// startEngine starts an engine whose command waits until the test is over. After
// the test it is stopped, and nothing may be left of it.
func startEngine(t testing.TB, net *topo.Topology, o engineOptions) *engine {
	t.Helper()
	if o.name == "" {
		o.name = newName()
	}
	e := &engine{user: o.user, name: o.name, net: net, done: make(chan struct{})}
	e.before = snapshot(t, net)
	args := []string{"run", "--name", o.name}
	if o.path != "" {
		args = append(args, "--path", o.path)
	}
	args = append(args, o.flags...)
	// cat ends when our end of its standard input closes, also if we are killed.
	e.cmd = e.slipway(append(args, "--", "sh", "-c", "echo $$; readlink /proc/self/ns/net; exec cat")...)
	stdin, out := e.begin(t)
	e.stdin = stdin
	t.Cleanup(func() { e.end(t) })
	var inode uint64
	line := make(chan error, 1)
	go func() {
		_, err := fmt.Fscanf(bufio.NewReader(out), "%d\nnet:[%d]\n", &e.pid, &inode)
		line <- err
		io.Copy(io.Discard, out) // ends with CMD
		out.Close()
	}()
	select {
	case err := <-line:
		if err != nil {
			t.Fatalf("engine %s did not start: %v\nstderr: %s", e.name, err, e.stderr.String())
		}
	case <-time.After(60 * time.Second):
		t.Fatalf("engine %s did not start within 60 s\nstderr: %s", e.name, e.stderr.String())
	}
	e.enter(t, inode)
	if !o.noCapture {
		var err error
		if e.capture, err = topo.StartCapture(e.guest, "slipway0"); err != nil {
			t.Logf("no capture: %v", err)
		}
	}
	return e
}

// begin starts the process with pipes.
func (e *engine) begin(t testing.TB) (io.Closer, io.ReadCloser) {
	t.Helper()
	stdin, err := e.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := e.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if e.cmd.Stderr, err = e.stderr.open(); err != nil {
		t.Fatal(err)
	}
	if err := e.net.Host.Start(e.cmd); err != nil {
		t.Fatalf("start %v: %v", e.cmd.Args, err)
	}
	go func() {
		e.state, _ = e.cmd.Process.Wait()
		close(e.done)
	}()
	return stdin, out
}

// enter opens the engine's namespace by its inode: the pid that CMD printed is
// not ours with --isolate pid.
func (e *engine) enter(t testing.TB, inode uint64) {
	t.Helper()
	links, _ := filepath.Glob("/proc/[0-9]*/ns/net")
	for _, l := range links {
		if to, err := os.Readlink(l); err == nil && to == fmt.Sprintf("net:[%d]", inode) {
			ns, err := topo.OpenNS("guest "+e.name, l)
			if err != nil {
				continue // it has just ended
			}
			if ns.Inode() == inode {
				e.guest = ns
				return
			}
			ns.Close()
		}
	}
	t.Fatalf("engine %s: no process has namespace %d", e.name, inode)
}

// end stops the engine in order and looks for what it left. A test may do so
// before its end.
func (e *engine) end(t testing.TB) {
	t.Helper()
	if e.ended {
		return
	}
	e.ended = true
	if t.Failed() {
		e.dump(t)
	}
	e.capture.Close()
	e.guest.Close()
	e.stdin.Close()
	select {
	case <-e.done:
	case <-time.After(15 * time.Second): // less than stop_timeout
		t.Errorf("engine %s did not end within 15 s of its command\nstderr: %s", e.name, e.stderr.String())
		e.cmd.Process.Kill()
		<-e.done
	}
	e.before.compare(t, e.net)
}

// call runs another slipway command of the same user in host.
func (e *engine) call(t testing.TB, args ...string) result {
	t.Helper()
	return finish(t, e.net.Host, e.slipway(args...), 30*time.Second)
}

// exec runs a command inside the engine with `slipway exec`.
func (e *engine) exec(t testing.TB, args ...string) result {
	t.Helper()
	return finish(t, e.net.Host, e.slipway(append([]string{"exec", e.name, "--"}, args...)...), 60*time.Second)
}

// dump writes down everything that helps to understand a failure.
func (e *engine) dump(t testing.TB) {
	t.Helper()
	t.Logf("stderr of slipway:\n%s", tail(e.stderr.String(), 8<<10))
	for _, args := range [][]string{{"status", e.name}, {"flows", e.name}} {
		cmd := e.slipway(args...)
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		if e.net.Host.Start(cmd) == nil {
			timer := time.AfterFunc(3*time.Second, func() { cmd.Process.Kill() })
			cmd.Wait()
			timer.Stop()
		}
		t.Logf("slipway %s:\n%s", strings.Join(args, " "), tail(out.String(), 8<<10))
	}
	dumpNS(t, e.net.Host)
	if e.guest == nil {
		return
	}
	dumpNS(t, e.guest)
	if e.capture != nil {
		keep(t, e.name+".pcap", e.capture.PCAP())
	}
}

// dumpNS logs addresses, routes, sockets and rules of a namespace.
func dumpNS(t testing.TB, ns *topo.NS) {
	t.Helper()
	for _, args := range [][]string{{"ip", "addr"}, {"ip", "route"}, {"ip", "-6", "route"}, {"ss", "-tuanp"}, {"nft", "list", "ruleset"}} {
		out, err := ns.Run("", args...)
		if err != nil {
			out = err.Error()
		}
		t.Logf("%s: %s\n%s", ns.Name, strings.Join(args, " "), tail(out, 4<<10))
	}
}

// keep writes a file for whoever reads the failure.
func keep(t testing.TB, name string, text []byte) {
	t.Helper()
	dir := os.Getenv(envKeep)
	if dir == "" {
		dir = filepath.Join(os.TempDir(), "slipway-test-artifacts")
	}
	path := filepath.Join(dir, strings.ReplaceAll(t.Name(), "/", "_")+"-"+name)
	if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(path, text, 0o644)); err != nil {
		t.Logf("keep %s: %v", name, err)
		return
	}
	t.Logf("kept %s", path)
}

// tail returns the last n bytes of s.
func tail(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return "..." + s[len(s)-n:]
}
