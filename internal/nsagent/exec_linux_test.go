package nsagent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func init() {
	guestTests = append(guestTests,
		guestTest{"exit_status", testExitStatus},
		guestTest{"exec_errors", testExecErrors},
		guestTest{"exec_arguments", testExecArguments},
		guestTest{"exec_environment", testExecEnvironment},
		guestTest{"exec_many", testExecMany},
		guestTest{"exec_cancelled", testExecCancelled},
		guestTest{"signals", testSignals},
		guestTest{"signal_dispositions", testSignalDispositions},
		guestTest{"orphans_are_reaped", testOrphansAreReaped},
		guestTest{"no_inherited_files", testNoInheritedFiles},
		guestTest{"pid_namespace", testPIDNamespace},
	)
}

func testExitStatus(t *testing.T) {
	g := start(t, testSpec(t))
	for script, want := range map[string]Status{
		"exit 0":       {},
		"exit 3":       {Code: 3},
		"exit 255":     {Code: 255},
		"kill -9 $$":   {Code: 137, Signal: syscall.SIGKILL},
		"kill -TERM 0": {Code: 143, Signal: syscall.SIGTERM}, // its own process group, not ours
	} {
		if _, got := g.output(t, Command{Args: []string{"sh", "-c", script}}); got != want {
			t.Errorf("%s: status %+v, want %+v", script, got, want)
		}
	}
}

func testExecErrors(t *testing.T) {
	g := start(t, testSpec(t))
	dir := t.TempDir()
	file := func(name, text string, mode os.FileMode) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		return p
	}
	plain := file("plain", "not a program", 0o644)
	broken := file("broken", "#!/nonexistent/interpreter\n", 0o755)
	denied := file("denied", "#!/bin/sh\n", 0o644)
	for _, tt := range []struct {
		name string
		cmd  Command
		code int
		err  error
	}{
		{"missing", Command{Args: []string{"no-such-program"}}, 127, nil},
		{"missing_path", Command{Args: []string{"/nonexistent/program"}}, 127, unix.ENOENT},
		{"below_a_file", Command{Args: []string{plain + "/x"}}, 127, unix.ENOTDIR},
		{"empty", Command{Args: []string{""}}, 127, nil},
		{"none", Command{}, 127, nil},
		{"not_executable", Command{Args: []string{plain}}, 126, unix.EACCES},
		{"directory", Command{Args: []string{dir}}, 126, unix.EISDIR},
		{"interpreter_missing", Command{Args: []string{broken}}, 127, unix.ENOENT},
		{"not_executable_in_path", Command{Args: []string{"denied"}, Env: []string{"PATH=/nonexistent:" + filepath.Dir(denied)}}, 126, unix.EACCES},
		{"nul", Command{Args: []string{"true", "a\x00b"}}, 126, nil},
		{"one_argument_too_long", Command{Args: []string{"true", strings.Repeat("x", 1<<20)}}, 126, unix.E2BIG},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := g.Exec(t.Context(), tt.cmd)
			var x *ExecError
			if !errors.As(err, &x) || x.Code != tt.code {
				t.Fatalf("error %v, want an ExecError with code %d", err, tt.code)
			}
			if tt.err != nil && !errors.Is(err, tt.err) {
				t.Errorf("error %v, want %v", err, tt.err)
			}
		})
	}
	_, err := g.Exec(t.Context(), Command{Args: []string{"true"}, Dir: "/nonexistent"})
	hinted(t, err, "a directory that exists")
	_, err = g.Exec(t.Context(), Command{Args: []string{"true"}, Dir: plain})
	if !errors.Is(err, unix.ENOTDIR) {
		t.Errorf("a file as directory: %v", err)
	}
	_, err = g.Exec(t.Context(), Command{Args: []string{"true"}, TTY: true})
	if !errors.Is(err, unix.ENOTTY) {
		t.Errorf("terminal without one: %v", err)
	}
	// After all that the agent still works.
	if got := g.sh(t, "echo fine"); got != "fine" {
		t.Errorf("got %q", got)
	}
}

func testExecArguments(t *testing.T) {
	g := start(t, testSpec(t))
	odd := "\xff\xfe not UTF-8 \n\t\"'\\ \x01"
	out, _ := g.output(t, Command{Args: []string{"printf", "%s", odd}})
	if out != odd {
		t.Errorf("argument arrived as %q, want %q", out, odd)
	}
	out, _ = g.output(t, Command{Args: []string{"printf", "<%s>", "", "b", ""}})
	if out != "<><b><>" {
		t.Errorf("empty arguments arrived as %q", out)
	}
	// The kernel takes 128 KiB per string and 2 MiB together (a quarter of an 8 MiB
	// stack); leave it some for what it adds itself.
	args := []string{"sh", "-c", `echo $#; printf %s "$@" | wc -c`, "sh"}
	for range 15 {
		args = append(args, strings.Repeat("x", 128<<10-1))
	}
	env := []string{"PATH=" + os.Getenv("PATH"), "BIG=" + strings.Repeat("y", 100<<10)}
	out, _ = g.output(t, Command{Args: args, Env: env})
	if want := fmt.Sprintf("15\n%d", 15*(128<<10-1)); out != want {
		t.Errorf("2 MiB of arguments arrived as %q, want %q", out, want)
	}
}

func testExecEnvironment(t *testing.T) {
	g := start(t, testSpec(t))
	dir := t.TempDir()
	script := filepath.Join(dir, "script")
	if err := os.WriteFile(script, []byte("echo no hash bang: $1\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		cmd  Command
		want string
	}{
		{"only_ours", Command{Args: []string{"env"}, Env: []string{"A=1", "PATH=/usr/bin:/bin"}}, "A=1\nPATH=/usr/bin:/bin"},
		{"default_path", Command{Args: []string{"env"}, Env: []string{"A=2"}}, "A=2"},
		{"directory", Command{Args: []string{"pwd"}, Dir: dir}, dir},
		{"relative_program", Command{Args: []string{"./script", "a"}, Dir: dir}, "no hash bang: a"},
		{"relative_path", Command{Args: []string{"script", "b"}, Dir: dir, Env: []string{"PATH=:/bin"}}, "no hash bang: b"},
		{"null_stdin", Command{Args: []string{"cat"}}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got, st := g.output(t, tt.cmd); got != tt.want || st.Code != 0 {
				t.Errorf("got %q, status %d; want %q", got, st.Code, tt.want)
			}
		})
	}
}

func testExecMany(t *testing.T) {
	g := start(t, testSpec(t))
	const n = 40
	done := make(chan error, n)
	for i := range n {
		go func() {
			p, err := g.Exec(t.Context(), Command{Args: []string{"sh", "-c", fmt.Sprintf("exit %d", i)}, Env: os.Environ()})
			if err == nil {
				var st Status
				if st, err = p.Wait(); err == nil && st.Code != i {
					err = fmt.Errorf("status %d, want %d", st.Code, i)
				}
			}
			done <- err
		}()
	}
	for range n {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func testExecCancelled(t *testing.T) {
	g := start(t, testSpec(t))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	p, err := g.Exec(ctx, Command{Args: []string{"sleep", "1000"}, Env: os.Environ()})
	if err == nil { // it started before we looked: that is a process like any other
		p.Signal(syscall.SIGKILL)
		p.Wait()
	} else if !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	eventually(t, "the process is gone", func() bool {
		g.mu.Lock()
		defer g.mu.Unlock()
		return len(g.procs) == 0
	})
}

func testSignals(t *testing.T) {
	g := start(t, testSpec(t))
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	p, err := g.Exec(t.Context(), Command{
		Args: []string{"sh", "-c", `trap "exit 7" USR1; echo $$; while :; do sleep 0.01; done`}, Env: os.Environ(), Stdout: w,
	})
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 32)
	n, err := r.Read(line)
	if err != nil {
		t.Fatal(err)
	}
	if pid, _ := strconv.Atoi(strings.TrimSpace(string(line[:n]))); pid != p.PID() {
		t.Errorf("PID %d, the process says %d", p.PID(), pid)
	}
	if err := p.Signal(os.Interrupt); err != nil {
		t.Error(err)
	}
	st, err := p.Wait()
	if want := (Status{Code: 130, Signal: syscall.SIGINT}); err != nil || st != want {
		t.Errorf("status %+v, error %v; want %+v", st, err, want)
	}
	if err := p.Signal(syscall.SIGTERM); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("signal to a dead process: %v", err)
	}
}

// Commands do not inherit that the agent catches signals.
func testSignalDispositions(t *testing.T) {
	g := start(t, testSpec(t))
	want, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for _, field := range []string{"SigBlk:", "SigIgn:"} {
		got := g.sh(t, "grep "+field+" /proc/self/status")
		if !strings.Contains(string(want), got+"\n") {
			t.Errorf("command has %q", got)
		}
	}
}

func testOrphansAreReaped(t *testing.T) {
	g := start(t, testSpec(t))
	// A child of a dead parent becomes the agent's, which has to reap it.
	pid := g.sh(t, `sh -c 'sh -c "read x" <&- >&- 2>&- & echo $!'`)
	eventually(t, "orphan reaped", func() bool {
		_, err := os.Stat("/proc/" + pid)
		return errors.Is(err, os.ErrNotExist)
	})
}

func testNoInheritedFiles(t *testing.T) {
	g := start(t, testSpec(t))
	// 3 is the directory that ls reads.
	if got, _ := g.output(t, Command{Args: []string{"ls", "/proc/self/fd"}}); got != "0\n1\n2\n3" {
		t.Errorf("a command has the descriptors %q", got)
	}
	// It may close what it was passed meanwhile.
	got := g.sh(t, fmt.Sprintf(`for f in /proc/%d/fd/*; do readlink $f; done; true`, g.PID()))
	if strings.Contains(got, "/dev/net/tun") || !strings.Contains(got, "socket:") {
		t.Errorf("the agent has a TUN, or not even its socket:\n%s", got)
	}
}

func testPIDNamespace(t *testing.T) {
	spec := testSpec(t)
	spec.PIDNamespace = true
	g := start(t, spec)
	if got := g.sh(t, `cat /proc/1/comm /proc/1/cmdline | tr '\0\n' '  '`); !strings.Contains(got, agentName) {
		t.Errorf("process 1 is %q", got)
	}
	if got := g.sh(t, `ls -d /proc/[0-9]* | wc -l`); len(got) > 1 {
		t.Errorf("%s processes in /proc", got)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	r.Fd() // makes it blocking, as cat expects
	p, err := g.Exec(t.Context(), Command{Args: []string{"cat"}, Stdin: r, Env: os.Environ()})
	r.Close()
	if err != nil {
		t.Fatal(err)
	}
	// The kernel gives it that name a moment after it has closed the files of the agent.
	eventually(t, fmt.Sprintf("cat is called so, if PID %d is the host's number", p.PID()), func() bool {
		comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", p.PID()))
		return string(comm) == "cat\n"
	})
	// An orphan in a session of its own that ignores TERM ends with the namespace.
	g.sh(t, `(trap "" TERM HUP; setsid sleep 1000 >&- 2>&- </dev/null &)`)
	end(t, g.Agent)
	if st, err := p.Wait(); err != nil || st.Signal != syscall.SIGTERM {
		t.Errorf("status %+v, error %v", st, err)
	}
}
