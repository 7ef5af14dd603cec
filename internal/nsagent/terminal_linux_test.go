package nsagent

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func init() {
	guestTests = append(guestTests,
		guestTest{"terminal_interrupt", testTerminalInterrupt},
		guestTest{"terminal_stop", testTerminalStop},
		guestTest{"terminal_shell", testTerminalShell},
		guestTest{"terminal_shell_suspends", testTerminalShellSuspends},
		guestTest{"terminal_shell_killed", testTerminalShellKilled},
		guestTest{"terminal_exec", testTerminalExec},
	)
}

// stopperRole stops itself on another thread than its first, and says when it goes on.
func stopperRole() {
	runtime.LockOSThread()
	on := make(chan struct{})
	go func() {
		stopSelf()
		fmt.Print("on")
		close(on)
	}()
	<-on
	os.Exit(0)
}

// The daemon does nothing between stopping itself and being continued.
func TestStopSelf(t *testing.T) {
	for range 20 {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		c := exec.Command(selfExe)
		c.Env = append(os.Environ(), envRole+"=stopper", "GORACE=atexit_sleep_ms=0")
		c.Stdout, c.Stderr = w, os.Stderr
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		w.Close()
		var status syscall.WaitStatus
		if _, err := syscall.Wait4(c.Process.Pid, &status, syscall.WUNTRACED, nil); err != nil || !status.Stopped() {
			t.Fatalf("status %#x, %v, want it stopped", status, err)
		}
		// It fails with EINTR where there is nothing to read.
		if n, _ := unix.Poll([]unix.PollFd{{Fd: int32(fdOf(t, r)), Events: unix.POLLIN}}, 0); n > 0 {
			t.Error("it went on before it was stopped")
		}
		c.Process.Signal(syscall.SIGCONT)
		if err := c.Wait(); err != nil {
			t.Error(err)
		}
		r.Close()
	}
}

// openPTY returns both ends of a new pseudo terminal.
func openPTY(t testing.TB) (master, slave *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { master.Close() })
	fd, err := rawFD(master)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	return master, slave
}

// console is a shell with job control on a terminal, and a user who types, always after
// something that shows who reads.
type console struct {
	t      testing.TB
	master *os.File
	seen   *lockedBuffer
	from   int // where the next expectation starts
}

// newConsole starts a login on a new terminal. In it, $daemon runs the daemon role, with
// the guest's main command in $run.
func newConsole(t *testing.T, spec Spec) *console {
	t.Helper()
	master, slave := openPTY(t)
	daemon := daemonCommand(t, spec, `eval "$run"`)
	shell := exec.Command("bash", "--norc", "--noprofile", "--noediting", "-i")
	shell.Env = append(daemon.Env, "PS1=outer> ", "HISTFILE=", "TERM=dumb", "daemon=env "+envRole+"=daemon "+exe(t))
	for i, e := range shell.Env { // the shell itself is no helper
		if strings.HasPrefix(e, envRole+"=") {
			shell.Env[i] = "UNUSED="
		}
	}
	shell.Stdin, shell.Stdout, shell.Stderr = slave, slave, slave
	shell.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := shell.Start(); err != nil {
		t.Fatal(err)
	}
	slave.Close()
	c := &console{t: t, master: master, seen: new(lockedBuffer)}
	read := make(chan struct{})
	go func() {
		defer close(read)
		b := make([]byte, 4096)
		for {
			n, err := master.Read(b)
			if err != nil {
				return // closed, or EIO: nobody has the other end
			}
			c.seen.Write(b[:n])
		}
	}()
	t.Cleanup(func() {
		if t.Failed() {
			out, _ := exec.Command("ps", "-t", strings.TrimPrefix(slave.Name(), "/dev/"),
				"-o", "pid,ppid,pgid,sess,tpgid,stat,wchan:20,ignored,pending,caught,args").CombinedOutput()
			t.Logf("processes on the terminal:\n%s", out)
		}
		master.Close() // hangs up: everybody on the terminal gets HUP
		<-read
		shell.Process.Kill()
		shell.Wait()
		if t.Failed() {
			t.Logf("the terminal showed:\n%s", c.seen)
		}
	})
	c.expect("outer> ")
	return c
}

// exe is a path of our program for a shell.
func exe(t testing.TB) string {
	t.Helper()
	return fmt.Sprintf("/proc/%d/exe", os.Getpid())
}

// typed sends what a user types.
func (c *console) typed(s string) {
	c.t.Helper()
	if _, err := c.master.WriteString(s); err != nil {
		c.t.Fatal(err)
	}
}

// expect waits until the terminal has shown s since the last expectation.
func (c *console) expect(s string) {
	c.t.Helper()
	eventually(c.t, fmt.Sprintf("the terminal shows %q", s), func() bool {
		i := strings.Index(c.seen.String()[c.from:], s)
		if i >= 0 {
			c.from += i + len(s)
		}
		return i >= 0
	})
}

const (
	ctrlC = "\x03"
	ctrlZ = "\x1a"
)

func testTerminalInterrupt(t *testing.T) {
	c := newConsole(t, testSpec(t))
	c.typed(`run='trap "echo interrupted; exit 4" INT; echo waiting; while :; do read x; done' $daemon` + "\n")
	c.expect("waiting\r\n")
	c.typed(ctrlC)
	c.expect("interrupted\r\n")
	c.expect("outer> ")
	c.typed("echo status=$?\n")
	c.expect("status=4\r\n")
	c.expect("outer> ")
}

func testTerminalStop(t *testing.T) {
	c := newConsole(t, testSpec(t))
	c.typed(`run='trap "echo continued" CONT; echo waiting; while ! read line; do :; done; echo "got $line"; exit 6' $daemon` + "\n")
	c.expect("waiting\r\n")
	c.typed(ctrlZ)
	c.expect("Stopped")
	c.expect("outer> ")
	c.typed("fg\n")
	c.expect("continued\r\n")
	c.typed("hello\n")
	c.expect("got hello\r\n")
	c.expect("outer> ")
	c.typed("echo status=$?\n")
	c.expect("status=6\r\n")
	c.expect("outer> ")
}

// innerShell starts an interactive shell as the main command.
func (c *console) innerShell() {
	c.t.Helper()
	c.typed(`run='exec env PS1=inner\>\  bash --norc --noprofile --noediting -i' $daemon` + "\n")
	c.expect("READY")
	c.typed("echo in-$((1+1))\n") // its first prompt may come before or after READY
	c.expect("in-2\r\n")
}

func testTerminalShell(t *testing.T) {
	for _, pidns := range []bool{false, true} {
		spec := testSpec(t)
		spec.PIDNamespace = pidns
		c := newConsole(t, spec)
		c.innerShell()
		// Without a fork: a stop between vfork(2) and exec would hang the shell.
		c.typed(`sh -c 'trap "echo continued" CONT; echo up-$((2+2)); while ! read x; do :; done'` + "\n")
		c.expect("up-4\r\n")
		c.typed(ctrlZ)
		c.expect("Stopped")
		c.expect("inner> ")
		c.typed("fg\n")
		c.expect("continued\r\n")
		c.typed(ctrlC)
		c.expect("inner> ")
		c.typed("echo status=$?\n")
		c.expect("status=130\r\n")
		c.typed("exit 8\n")
		c.expect("outer> ")
		c.typed("echo status=$?\n")
		c.expect("status=8\r\n")
		if strings.Contains(c.seen.String(), "no job control") {
			t.Error("the inner shell has no job control")
		}
	}
}

func testTerminalShellSuspends(t *testing.T) {
	c := newConsole(t, testSpec(t))
	c.innerShell()
	for range 2 {
		c.expect("inner> ")
		c.typed("suspend\n")
		c.expect("Stopped")
		c.expect("outer> ")
		c.typed("fg\n")
		c.expect("fg\r\n")
		c.typed("echo again-$((1+2))\n")
		c.expect("again-3\r\n")
	}
	c.typed("exit 9\n")
	c.expect("outer> ")
	c.typed("echo status=$?\n")
	c.expect("status=9\r\n")
}

// A shell that dies leaves the terminal to a process group without anybody in it; the
// daemon takes it back, which shows in a shell script, where nobody else does.
func testTerminalShellKilled(t *testing.T) {
	c := newConsole(t, testSpec(t))
	c.typed(`sh -c 'run="exec env PS1=inner\>\  bash --norc --noprofile --noediting -i" '"$daemon"'; echo status=$?; read x; echo got $x'` + "\n")
	c.expect("READY")
	c.typed("echo in-$((1+1))\n")
	c.expect("in-2\r\n")
	c.expect("inner> ")
	c.typed("kill -9 $$\n")
	c.expect("status=137\r\n")
	c.typed("line\n")
	c.expect("got line\r\n")
	c.expect("outer> ")
}

// An exec with a terminal of its own is a session of its own.
func testTerminalExec(t *testing.T) {
	g := start(t, testSpec(t))
	master, slave := openPTY(t)
	p, err := g.Exec(t.Context(), Command{
		Args: []string{"sh", "-c", `tty; test "$(cut -d' ' -f6 /proc/$$/stat)" = $$ && echo leader; : >/dev/tty && read x </dev/tty; echo "got $x"`},
		Env:  os.Environ(), Stdin: slave, Stdout: slave, Stderr: slave, TTY: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	name := slave.Name()
	slave.Close()
	if _, err := master.WriteString("typed\n"); err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	b := make([]byte, 4096)
	for {
		n, err := master.Read(b)
		if err != nil {
			break // EIO at the end
		}
		out.Write(b[:n])
	}
	if st, err := p.Wait(); err != nil || st.Code != 0 {
		t.Errorf("status %+v, error %v", st, err)
	}
	for _, want := range []string{name, "leader", "got typed"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in %q", want, &out)
		}
	}
}
