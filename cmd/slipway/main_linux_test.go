package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The tests run the built binary, in namespaces of their own: a network with lo and one
// end of a veth pair, and an empty /run. Nothing they do is seen outside, and nothing
// outside decides how they end.

const (
	envInside = "SLIPWAY_TEST_INSIDE" // set in the namespaces
	envBin    = "SLIPWAY_TEST_BIN"    // the built binary
	hostAddr  = "198.51.100.2/24"     // of the network inside (RFC 5737)
)

// bin is the binary under test.
var bin = os.Getenv(envBin)

func TestMain(m *testing.M) {
	if os.Getenv(envPretend) != "" {
		os.Exit(m.Run())
	}
	if os.Getenv(envInside) == "" {
		os.Exit(outside())
	}
	if err := furnish(); err != nil {
		fmt.Fprintln(os.Stderr, "furnish namespaces:", err)
		os.Exit(1)
	}
	// Under nohup HUP is ignored, and so it would be for what we start.
	signal.Notify(make(chan os.Signal, 1), unix.SIGHUP)
	os.Exit(m.Run())
}

// outside builds the binary and runs the tests once more, in new namespaces.
func outside() int {
	dir, err := os.MkdirTemp("", "slipway-cli-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	bin := filepath.Join(dir, "slipway")
	build := exec.Command("go", "build", "-o", bin, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "go build: %v\n%s", err, out)
		return 1
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), envInside+"=1", envBin+"="+bin)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET}
	if uid := os.Geteuid(); uid != 0 {
		cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: uid, Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getegid(), Size: 1}}
	}
	err = cmd.Run()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		return 1
	}
	if err == nil {
		return 0
	}
	fmt.Fprintln(os.Stderr, "not available: namespaces for the tests:", err)
	if os.Getenv("NETNS_TESTS") == "require" {
		return 1
	}
	return 0
}

// furnish makes the namespaces a little home.
func furnish() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("tmpfs", "/run", "tmpfs", 0, "mode=0755"); err != nil {
		return fmt.Errorf("mount /run: %w", err)
	}
	for _, name := range []string{"XDG_RUNTIME_DIR", "XDG_CONFIG_HOME"} {
		os.Unsetenv(name)
	}
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "eth1"}); err != nil {
		return fmt.Errorf("make a veth pair: %w", err)
	}
	for _, name := range []string{"lo", "eth0", "eth1"} {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		if name == "eth0" {
			a, err := netlink.ParseAddr(hostAddr)
			if err != nil {
				return err
			}
			if err := netlink.AddrAdd(l, a); err != nil {
				return fmt.Errorf("add address: %w", err)
			}
		}
		if err := netlink.LinkSetUp(l); err != nil {
			return fmt.Errorf("set %s up: %w", name, err)
		}
	}
	return nil
}

// needEngines skips a test where no engine can be started, or fails it where skips are
// not allowed.
func needEngines(t *testing.T) {
	t.Helper()
	f, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	if err == nil {
		f.Close()
		return
	}
	if os.Getenv("NETNS_TESTS") == "require" {
		t.Fatalf("not available: %v", err)
	}
	t.Skipf("not available: %v", err)
}

// result is what a finished command said.
type result struct {
	stdout, stderr string
	code           int
}

// limit is how long a command of a test may take.
const limit = time.Minute

// slipway runs a command to its end.
func slipway(t *testing.T, args ...string) result {
	t.Helper()
	var out, errOut bytes.Buffer
	cmd := command(t, args...)
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		t.Fatalf("slipway %v: %v", args, err)
	}
	return result{out.String(), errOut.String(), code(cmd)}
}

// command makes a command that is killed when the test takes too long.
func command(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), bin, args...)
	cmd.WaitDelay = limit
	return cmd
}

// code is the exit status as a shell sees it.
func code(cmd *exec.Cmd) int {
	if w := cmd.ProcessState.Sys().(syscall.WaitStatus); w.Signaled() {
		return 128 + int(w.Signal())
	}
	return cmd.ProcessState.ExitCode()
}

// eventually polls until ok is true.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(limit); !ok(); {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", limit, what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// started is an engine that runs in the background.
type started struct {
	*exec.Cmd
	stderr bytes.Buffer // to be read after end
	name   string
	ended  bool
}

// start runs an engine with the given words before the --, and waits until it answers.
func start(t *testing.T, name string, args ...string) *started {
	t.Helper()
	e := &started{Cmd: command(t, args...), name: name}
	e.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // no controlling terminal
	e.Stderr = &e.stderr
	if err := e.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if !e.ended {
			e.Process.Kill()
			e.Wait()
			eventually(t, "the guest ends", func() bool { return len(guests(t)) == 0 })
		}
	})
	eventually(t, "engine "+name+" answers", func() bool {
		if unix.Kill(e.Process.Pid, 0) != nil {
			t.Fatalf("engine %s ended: %s", name, e.stderr.String())
		}
		return slipway(t, "status", name).code == 0
	})
	return e
}

// end waits for the engine's end and returns its exit status.
func (e *started) end(t *testing.T) int {
	t.Helper()
	e.ended = true
	timer := time.AfterFunc(limit, func() { e.Process.Kill() })
	defer timer.Stop()
	e.Wait()
	return code(e.Cmd)
}

// guests are the processes in other network namespaces than ours: there should be none
// between tests, which run one at a time.
func guests(t *testing.T) []string {
	t.Helper()
	own, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	links, _ := filepath.Glob("/proc/[0-9]*/ns/net")
	var found []string
	for _, l := range links {
		to, err := os.Readlink(l)
		if err == nil && to != own && descends(l) {
			found = append(found, l)
		}
	}
	return found
}

// descends reports whether the process of a /proc/PID/ns/net has our mounts: other
// programs of this machine are none of our business.
func descends(link string) bool {
	b, err := os.ReadFile(filepath.Join(filepath.Dir(filepath.Dir(link)), "environ"))
	return err == nil && strings.Contains(string(b), envBin+"="+bin)
}

// nothingLeft fails the test if an engine left something.
func nothingLeft(t *testing.T) {
	t.Helper()
	if _, err := os.Stat("/run/slipway"); !errors.Is(err, os.ErrNotExist) {
		list, _ := filepath.Glob("/run/slipway/*/*")
		t.Errorf("state is left: %v %v", err, list)
	}
	eventually(t, "no process is left", func() bool { return len(guests(t)) == 0 })
}
