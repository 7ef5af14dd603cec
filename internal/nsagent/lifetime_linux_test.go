package nsagent

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func init() {
	guestTests = append(guestTests,
		guestTest{"close", testClose},
		guestTest{"close_stubborn", testCloseStubborn},
		guestTest{"close_cancelled", testCloseCancelled},
		guestTest{"close_stopped", testCloseStopped},
		guestTest{"close_stuck", testCloseStuck},
		guestTest{"close_leaves_nothing", testCloseLeavesNothing},
		guestTest{"daemon_killed", testDaemonKilled},
		guestTest{"agent_killed", testAgentKilled},
		guestTest{"program_replaced", testProgramReplaced},
		guestTest{"agent_ignores_signals", testAgentIgnoresSignals},
	)
}

// envSpec and envCommand tell the daemon role what to run.
const (
	envSpec    = "NSAGENT_TEST_SPEC"
	envCommand = "NSAGENT_TEST_COMMAND"
	envReplace = "NSAGENT_TEST_REPLACE" // a file to replace before the agent starts
)

// daemonRole is a small daemon: it runs one main command as `slipway run` does.
func daemonRole() {
	signal.Notify(make(chan os.Signal, 1), syscall.SIGINT) // the command's business
	var spec Spec
	err := json.Unmarshal([]byte(os.Getenv(envSpec)), &spec)
	if err != nil {
		panic(err)
	}
	if path := os.Getenv(envReplace); path != "" {
		os.WriteFile(path+".new", []byte("another program"), 0o755)
		os.Rename(path+".new", path)
	}
	ctx := context.Background()
	a, err := Start(ctx, spec, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	if err != nil {
		fmt.Println("FAILED", err)
		os.Exit(125)
	}
	p, err := a.Exec(ctx, Command{
		Args: []string{"sh", "-c", os.Getenv(envCommand)}, Env: os.Environ(),
		Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, Main: true,
	})
	if err != nil {
		fmt.Println("FAILED", err)
		os.Exit(126)
	}
	fmt.Println("READY", a.PID(), p.PID())
	st, _ := p.Wait()
	a.Close(ctx)
	a.TUN().Close()
	a.Release()
	os.Exit(st.Code)
}

// daemonCommand prepares the daemon role.
func daemonCommand(t testing.TB, spec Spec, script string) *exec.Cmd {
	t.Helper()
	b, err := json.Marshal(spec)
	if err != nil {
		t.Fatal(err)
	}
	c := exec.Command(selfExe)
	c.Env = append(os.Environ(), envRole+"=daemon", envSpec+"="+string(b), envCommand+"="+script)
	c.Stderr = os.Stderr
	return c
}

// awaitReady reads the daemon role's announcement.
func awaitReady(t testing.TB, sc *bufio.Scanner) (agent, command int) {
	t.Helper()
	for sc.Scan() {
		if _, err := fmt.Sscanf(sc.Text(), "READY %d %d", &agent, &command); err == nil {
			return agent, command
		}
	}
	t.Fatalf("the daemon did not start: %v", sc.Err())
	return 0, 0
}

// alive tells whether a process exists and is more than a zombie.
func alive(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, rest, _ := strings.Cut(string(b), ") ")
	return !strings.HasPrefix(rest, "Z") && !strings.HasPrefix(rest, "X")
}

// awaitTrap waits until a process catches or ignores TERM (proc(5): SigCgt, SigIgn).
func awaitTrap(t testing.TB, pid int, field string) {
	t.Helper()
	eventually(t, field+" has TERM", func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			t.Fatal(err)
		}
		_, rest, _ := strings.Cut(string(b), field+":")
		mask, _, _ := strings.Cut(strings.TrimSpace(rest), "\n")
		n, err := strconv.ParseUint(mask, 16, 64)
		return err == nil && n&(1<<(unix.SIGTERM-1)) != 0
	})
}

func testClose(t *testing.T) {
	spec := testSpec(t)
	spec.StopTimeout = time.Hour
	g := start(t, spec)
	file := filepath.Join(t.TempDir(), "said")
	p, err := g.Exec(t.Context(), Command{Env: os.Environ(), Args: []string{"sh", "-c",
		`trap "echo bye >` + file + `; exit 5" TERM; while :; do sleep 0.01; done`}})
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-g.Done():
		t.Error("done before Close")
	default:
	}
	awaitTrap(t, p.PID(), "SigCgt")
	began := time.Now()
	end(t, g.Agent) // not after an hour, as the command ends by itself
	if d := time.Since(began); d > time.Minute {
		t.Errorf("Close took %v", d)
	}
	if st, err := p.Wait(); err != nil || st.Code != 5 {
		t.Errorf("status %+v, error %v; want 5", st, err)
	}
	if b, _ := os.ReadFile(file); string(b) != "bye\n" {
		t.Error("the command was not asked to end")
	}
	<-g.Done()
	if _, err := g.Exec(t.Context(), Command{Args: []string{"true"}}); !errors.Is(err, ErrClosed) {
		t.Errorf("Exec after Close: %v", err)
	}
	end(t, g.Agent) // once more does no harm
}

// What does not listen to TERM is killed after StopTimeout.
func testCloseStubborn(t *testing.T) {
	spec := testSpec(t)
	spec.StopTimeout = 200 * time.Millisecond
	var took time.Duration
	for range 5 { // on a busy machine one may take longer, but not all
		g := start(t, spec)
		p, err := g.Exec(t.Context(), Command{Env: os.Environ(), Args: []string{"sh", "-c", `trap "" TERM; sleep 1000`}})
		if err != nil {
			t.Fatal(err)
		}
		awaitTrap(t, p.PID(), "SigIgn")
		began := time.Now()
		end(t, g.Agent)
		took = time.Since(began)
		if took < spec.StopTimeout {
			t.Errorf("Close took only %v", took)
		}
		if st, err := p.Wait(); err != nil || st.Signal != syscall.SIGKILL {
			t.Errorf("status %+v, error %v; want KILL", st, err)
		}
		if took < spec.StopTimeout+orphanGrace {
			return
		}
	}
	t.Errorf("Close took %v", took)
}

// A Close whose context ends does not wait for StopTimeout.
func testCloseCancelled(t *testing.T) {
	spec := testSpec(t)
	spec.StopTimeout = time.Hour
	g := start(t, spec)
	p, err := g.Exec(t.Context(), Command{Env: os.Environ(), Args: []string{"sh", "-c", `trap "" TERM; sleep 1000`}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	closed := make(chan error)
	go func() { closed <- g.Close(ctx) }()
	cancel()
	if err := <-closed; err != nil {
		t.Error(err)
	}
	if st, err := p.Wait(); err != nil || st.Signal == nil {
		t.Errorf("status %+v, error %v; want a signal", st, err)
	}
}

// An agent that does not answer is killed, and what it had started with it.
func testCloseStuck(t *testing.T) {
	g := start(t, testSpec(t))
	p, err := g.Exec(t.Context(), Command{Env: os.Environ(), Args: []string{"sleep", "1000"}})
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(g.PID(), unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	eventually(t, "every thread of the agent is stopped", func() bool {
		stats, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", g.PID()))
		for _, path := range stats {
			if b, _ := os.ReadFile(path); !strings.Contains(string(b), ") T ") {
				return false
			}
		}
		return len(stats) > 0
	})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := g.Close(ctx); err != nil {
		t.Error(err)
	}
	if _, err := p.Wait(); !errors.Is(err, ErrClosed) {
		t.Errorf("Wait: %v", err)
	}
	if alive(p.PID()) {
		t.Error("the command is alive")
	}
}

// A command stopped by Ctrl-Z hears TERM, too.
func testCloseStopped(t *testing.T) {
	spec := testSpec(t)
	spec.StopTimeout = time.Hour
	g := start(t, spec)
	p, err := g.Exec(t.Context(), Command{Env: os.Environ(), Args: []string{"sleep", "1000"}})
	if err != nil {
		t.Fatal(err)
	}
	p.Signal(syscall.SIGSTOP)
	began := time.Now()
	end(t, g.Agent)
	if st, _ := p.Wait(); st.Signal != syscall.SIGTERM || time.Since(began) > time.Minute {
		t.Errorf("status %+v after %v", st, time.Since(began))
	}
}

// trace is what a guest could leave on the host.
func trace(t testing.TB) string {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	links, err := os.ReadDir("/sys/class/net")
	if err != nil {
		t.Fatal(err)
	}
	ours := slices.DeleteFunc(links, func(e os.DirEntry) bool { return !strings.HasPrefix(e.Name(), "slipway") }) // others come and go
	return fmt.Sprintf("children %v\nfiles %d\nlinks %v\n%s", directChildren(), len(fds), ours, mounts)
}

func testCloseLeavesNothing(t *testing.T) {
	end(t, start(t, testSpec(t)).Agent) // opens what Go's runtime keeps for good
	before := trace(t)
	mark := fmt.Sprint(100000 + os.Getpid()) // other modes run beside us
	for _, orphan := range []string{
		`(setsid sh -c 'trap "" HUP; sleep ` + mark + `' >&- 2>&- </dev/null & )`,
		`(sh -c 'trap "" TERM; sleep ` + mark + `' >&- 2>&- </dev/null & )`,
	} {
		g := start(t, testSpec(t))
		left := g.sh(t, orphan+`
			mount -t tmpfs tmpfs /mnt; mount --bind /mnt /media
			echo $$`)
		end(t, g.Agent)
		if pid, _ := strconv.Atoi(left); alive(pid) {
			t.Errorf("process %s is alive", left)
		}
	}
	if after := trace(t); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	if out, err := exec.Command("pgrep", "-f", "^sleep "+mark+"$").Output(); err == nil {
		t.Errorf("orphans are left: %s", out)
	}
}

// Nothing survives a daemon that was killed.
func testDaemonKilled(t *testing.T) {
	for _, pidns := range []bool{false, true} {
		spec := testSpec(t)
		spec.PIDNamespace = pidns
		c := daemonCommand(t, spec, `sleep 1000 & setsid sleep 1000 & echo ORPHANS $! ; wait`)
		out, err := c.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		var agent, command, orphan int
		for sc := bufio.NewScanner(out); command == 0 || orphan == 0; { // in any order
			if !sc.Scan() {
				t.Fatalf("the daemon did not start: %v", sc.Err())
			}
			fmt.Sscanf(sc.Text(), "READY %d %d", &agent, &command)
			fmt.Sscanf(sc.Text(), "ORPHANS %d", &orphan)
		}
		c.Process.Kill()
		c.Wait()
		eventually(t, "agent and command ended", func() bool { return !alive(agent) && !alive(command) })
		if !pidns { // else the number is the guest's
			eventually(t, "orphan ended", func() bool { return !alive(orphan) })
		}
	}
}

// When the agent is killed, the daemon ends what it had started.
func testAgentKilled(t *testing.T) {
	g := start(t, testSpec(t))
	ours := exec.Command("sleep", "1000") // a child of the daemon's own stays
	if err := ours.Start(); err != nil {
		t.Fatal(err)
	}
	defer ours.Wait()
	defer ours.Process.Kill()
	p, err := g.Exec(t.Context(), Command{Env: os.Environ(), Args: []string{"sh", "-c", `sleep 1000 & sleep 1000`}})
	if err != nil {
		t.Fatal(err)
	}
	pids := strings.Fields(g.sh(t, fmt.Sprintf(`(setsid unshare -n sleep 1000 </dev/null >&- 2>&- & echo $!); echo %d`, p.PID())))
	unix.Kill(g.PID(), unix.SIGKILL)
	if _, err := p.Wait(); !errors.Is(err, ErrClosed) {
		t.Errorf("Wait: %v, want ErrClosed", err)
	}
	<-g.Done()
	<-g.ended
	for _, s := range pids {
		if pid, _ := strconv.Atoi(s); alive(pid) {
			t.Errorf("process %s is alive", s)
		}
	}
	if !alive(ours.Process.Pid) {
		t.Error("a child of the daemon's own was killed")
	}
	if !strings.Contains(g.log.String(), "unexpectedly") {
		t.Errorf("log: %s", g.log)
	}
}

// An update replaces the program while the daemon runs.
func testProgramReplaced(t *testing.T) {
	program := filepath.Join(t.TempDir(), "program")
	self, err := os.ReadFile(selfExe)
	if err == nil {
		err = os.WriteFile(program, self, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	c := daemonCommand(t, testSpec(t), "exit 9")
	c.Path = program
	c.Env = append(c.Env, envReplace+"="+program)
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	awaitReady(t, bufio.NewScanner(out))
	var x *exec.ExitError
	if err := c.Wait(); !errors.As(err, &x) || x.ExitCode() != 9 {
		t.Errorf("%v, want exit status 9", err)
	}
	if b, err := os.ReadFile(program); err != nil || string(b) != "another program" {
		t.Errorf("not replaced: %v", err)
	}
}

// Signals to the whole process group are for the command; the agent stays.
func testAgentIgnoresSignals(t *testing.T) {
	g := start(t, testSpec(t))
	for _, s := range []syscall.Signal{
		unix.SIGINT, unix.SIGQUIT, unix.SIGHUP, unix.SIGTERM, unix.SIGTSTP, unix.SIGTTIN, unix.SIGTTOU,
		unix.SIGUSR1, unix.SIGUSR2, unix.SIGPIPE, unix.SIGALRM, unix.SIGWINCH,
	} {
		if err := unix.Kill(g.PID(), s); err != nil {
			t.Fatal(err)
		}
		if got := g.sh(t, "echo here"); got != "here" {
			t.Errorf("after %v: %q", s, got)
		}
	}
}
