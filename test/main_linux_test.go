package test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/slipway-net/slipway/test/topo"
	"golang.org/x/sys/unix"
)

// The tests run in a pid and a mount namespace of their own, and in a user
// namespace too where we are not root: TestMain starts the test binary once more
// through unshare(1). Whatever a test leaves running ends with that process,
// /run and /etc may be changed at will, and "what is left over" is exactly what
// /proc, /run and the mount table show.
const (
	envInner   = "SLIPWAY_TEST_INNER"     // set in the inner process
	envBin     = "SLIPWAY_BIN"            // the slipway to test; built here if unset
	envMissing = "SLIPWAY_TEST_MISSING"   // why the inner process could not be made
	envRequire = "NETNS_TESTS"            // "require": what is missing fails instead of skips
	envLong    = "SLIPWAY_LONG"           // "1": the long tests too
	envKeep    = "SLIPWAY_TEST_ARTIFACTS" // folder for what a failed test keeps
)

// Values of envInner for processes that are not the tests.
const (
	roleInit = "init" // the first process of the pid namespace
	roleEcho = "echo" // a server of the tests
)

// runTmp is TMPDIR of every slipway that the tests start.
const runTmp = "/run/tmp"

// helperPath is this test binary for processes of any user, with a role in envInner.
const helperPath = "/run/slipway-test-helper"

// ordinaryUser is the unprivileged user that rootless variants run as when the
// tests run as root. It exists only in the /etc of the tests.
const ordinaryUser = 4242

func TestMain(m *testing.M) {
	switch os.Getenv(envInner) {
	case "":
		os.Exit(outer())
	case roleInit:
		os.Exit(initProcess())
	case roleEcho:
		os.Exit(echo())
	case roleHammer:
		os.Exit(hammer())
	case roleLease:
		os.Exit(lease())
	}
	// Under nohup HUP is ignored, and so it would be for what we start.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP)
	os.Exit(inner(m))
}

// initProcess is the first process of the pid namespace: it runs the tests and
// reaps whoever loses its parent, as every init does. Without it the zombie of an
// orphan would look like a process that slipway left.
func initProcess() int {
	self, err := os.Executable()
	if err != nil {
		fmt.Fprintln(os.Stderr, "test:", err)
		return 1
	}
	os.Setenv(envInner, "1")
	tests, err := os.StartProcess(self, os.Args, &os.ProcAttr{Files: []*os.File{os.Stdin, os.Stdout, os.Stderr}})
	if err != nil {
		fmt.Fprintln(os.Stderr, "test:", err)
		return 1
	}
	for {
		var ws syscall.WaitStatus
		switch pid, err := syscall.Wait4(-1, &ws, 0, nil); {
		case err == syscall.EINTR || err == nil && pid != tests.Pid:
		case err != nil:
			fmt.Fprintln(os.Stderr, "test:", err)
			return 1
		case ws.Exited():
			return ws.ExitStatus()
		default:
			fmt.Fprintln(os.Stderr, "test: tests ended by", ws.Signal())
			return 1
		}
	}
}

// outer builds slipway and runs the tests in their own namespaces.
func outer() int {
	env := append(os.Environ(), envInner+"="+roleInit)
	if os.Getenv(envBin) == "" {
		dir, err := os.MkdirTemp("", "slipway-test-bin-")
		if err != nil {
			fmt.Fprintln(os.Stderr, "test:", err)
			return 1
		}
		defer os.RemoveAll(dir)
		bin := filepath.Join(dir, "slipway")
		build := exec.Command("go", "build", "-o", bin, "../cmd/slipway")
		build.Stderr = os.Stderr
		if err := build.Run(); err != nil {
			fmt.Fprintln(os.Stderr, "test: build slipway:", err)
			return 1
		}
		// The rootless variants run it as another user.
		if err := errors.Join(os.Chmod(dir, 0o755), os.Chmod(bin, 0o755)); err != nil {
			fmt.Fprintln(os.Stderr, "test:", err)
			return 1
		}
		env = append(env, envBin+"="+bin)
	}
	self, err := os.Executable()
	if err != nil {
		fmt.Fprintln(os.Stderr, "test:", err)
		return 1
	}
	args := []string{"--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "--propagation", "private"}
	if os.Getuid() != 0 {
		args = append(args, "--user", "--map-root-user", "--net")
	}
	cmd := exec.Command("unshare", append(append(args, self), os.Args[1:]...)...)
	if out, err := exec.Command("unshare", append(args, "true")...).CombinedOutput(); err != nil {
		// Run all the same: each test then says what is missing.
		env = append(env, fmt.Sprintf("%s=unshare %s: %v: %s", envMissing, strings.Join(args, " "), err, strings.TrimSpace(string(out))))
		env = append(env, envInner+"=1")
		cmd = exec.Command(self, os.Args[1:]...)
	}
	cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr = env, os.Stdin, os.Stdout, os.Stderr
	return wait(cmd)
}

// wait runs the inner process and returns its exit status. If we are killed the
// kernel kills unshare, which takes its pid namespace with it.
func wait(cmd *exec.Cmd) int {
	runtime.LockOSThread() // Pdeathsig follows the thread, not the process
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		fmt.Fprintln(os.Stderr, "test:", err)
		return 1
	}
	quit := make(chan os.Signal, 1)
	signal.Notify(quit, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	go func() {
		<-quit
		cmd.Process.Kill()
	}()
	err := cmd.Wait()
	exit := new(exec.ExitError)
	if errors.As(err, &exit) && exit.ExitCode() > 0 {
		return exit.ExitCode()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "test:", err)
		return 1
	}
	return 0
}

// notReady says why no test can run; empty if they can.
var notReady string

func inner(m *testing.M) int {
	notReady = os.Getenv(envMissing)
	if notReady == "" {
		if err := prepare(); err != nil {
			notReady = err.Error()
		}
	}
	return m.Run()
}

// prepare gives the inner process its own /run, /etc and /dev/net/tun.
func prepare() error {
	tmp, err := os.MkdirTemp("", "slipway-test-etc-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp) // empty again once the tmpfs has moved
	if err := unix.Mount("tmpfs", tmp, "tmpfs", 0, "mode=0755"); err != nil {
		return fmt.Errorf("tmpfs: %w", err)
	}
	if err := copyTree("/etc", tmp); err != nil {
		return fmt.Errorf("copy /etc: %w", err)
	}
	if err := unix.Mount(tmp, "/etc", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("mount /etc: %w", err)
	}
	// The machine's named namespaces, which come and go under our eyes.
	names, _ := filepath.Glob("/run/netns/*")
	for _, n := range names {
		unix.Unmount(n, unix.MNT_DETACH)
	}
	if err := unix.Mount("tmpfs", "/run", "tmpfs", 0, "mode=0755"); err != nil {
		return fmt.Errorf("mount /run: %w", err)
	}
	user := fmt.Sprintf("/run/user/%d", ordinaryUser)
	if err := errors.Join(
		os.MkdirAll(user, 0o755), os.Chmod(user, 0o700),
		os.MkdirAll("/run/lock", 0o1777),
		os.MkdirAll("/run/netns", 0o755),
		os.MkdirAll("/run/mount", 0o755),              // mount(8)
		os.WriteFile("/run/xtables.lock", nil, 0o600), // iptables-legacy leaves it
		os.Mkdir(runTmp, 0o777), os.Chmod(runTmp, 0o1777),
		writeResolvConf(),
		raiseFileLimit(),
	); err != nil {
		return err
	}
	if err := ownPrograms(); err != nil {
		return err
	}
	if isRoot() {
		if err := errors.Join(os.Chown(user, ordinaryUser, ordinaryUser), addOrdinaryUser(), tunForAll()); err != nil {
			return err
		}
	}
	// As systemd leaves it: new mounts show in namespaces made from this one.
	return unix.Mount("", "/", "", unix.MS_SHARED|unix.MS_REC, "")
}

// ownPrograms gives programs of the tests paths that every user may run: go test keeps
// its binary in a folder that only root may read.
func ownPrograms() error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(helperPath, nil, 0o755),
		unix.Mount(self, helperPath, "", unix.MS_BIND, ""),
		os.Symlink(os.Getenv(envBin), proxyPath),
	)
}

// isRoot tells whether the tests run as the real root: then the rootless variant
// can be an ordinary user.
func isRoot() bool {
	b, err := os.ReadFile("/proc/self/uid_map")
	return err == nil && os.Getuid() == 0 && strings.Contains(string(b), "4294967295")
}

func writeResolvConf() error {
	text := fmt.Sprintf("# the tests' own\nnameserver %v\nnameserver %v\nsearch example.test\n", topo.DNS4, topo.DNS6)
	os.Remove("/etc/resolv.conf") // may be a link to a place we do not see any more
	return os.WriteFile("/etc/resolv.conf", []byte(text), 0o644)
}

// raiseFileLimit lets the tests, and with them slipway, hold 10,000 flows.
func raiseFileLimit() error {
	const want = 65536
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return err
	}
	if l.Max >= want {
		return nil
	}
	// Only root may; without it the test that needs it says so.
	_ = unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: want, Max: want})
	return nil
}

// addOrdinaryUser writes the user with its ranges of subordinate ids.
func addOrdinaryUser() error {
	var errs []error
	for file, line := range map[string]string{
		"/etc/passwd": "slipway-test:x:%[1]d:%[1]d::/run/user/%[1]d:/bin/sh\n",
		"/etc/group":  "slipway-test:x:%[1]d:\n",
		"/etc/subuid": "slipway-test:300000:65536\n",
		"/etc/subgid": "slipway-test:300000:65536\n",
	} {
		f, err := os.OpenFile(file, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if strings.Contains(line, "%") {
			line = fmt.Sprintf(line, ordinaryUser)
		}
		_, err = f.WriteString(line)
		errs = append(errs, err, f.Close())
	}
	return errors.Join(errs...)
}

// tunForAll gives /dev/net/tun the mode distributions give it; on minimal
// machines it is root's.
func tunForAll() error {
	const tun = "/dev/net/tun"
	st, err := os.Stat(tun)
	if err != nil || st.Mode().Perm()&0o006 == 0o006 {
		return err
	}
	node := "/run/tun"
	if err := unix.Mknod(node, unix.S_IFCHR|0o666, int(unix.Mkdev(10, 200))); err != nil {
		return fmt.Errorf("%s: %w", node, err)
	}
	if err := os.Chmod(node, 0o666); err != nil {
		return err
	}
	return unix.Mount(node, tun, "", unix.MS_BIND, "")
}

// copyTree copies files, folders and links; what we may not read is left out.
func copyTree(from, to string) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		rel, _ := filepath.Rel(from, path)
		dst := filepath.Join(to, rel)
		switch {
		case err != nil || rel == ".":
			return nil
		case d.IsDir():
			return os.MkdirAll(dst, 0o755)
		case d.Type()&fs.ModeSymlink != 0:
			if link, err := os.Readlink(path); err == nil {
				return os.Symlink(link, dst)
			}
			return nil
		case !d.Type().IsRegular():
			return nil
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if err := os.WriteFile(dst, text, info.Mode().Perm()); err != nil {
			return err
		}
		return os.Lchown(dst, owner(info, true), owner(info, false))
	})
}

// owner returns the uid or gid of a file, or -1 where it cannot be given.
func owner(info fs.FileInfo, uid bool) int {
	st, ok := info.Sys().(*syscall.Stat_t)
	switch {
	case !ok || os.Getuid() != 0 || !isRoot():
		return -1
	case uid:
		return int(st.Uid)
	}
	return int(st.Gid)
}

// missing skips a test that cannot run here, loudly; with NETNS_TESTS=require
// the test fails.
func missing(t testing.TB, format string, args ...any) {
	t.Helper()
	what := fmt.Sprintf(format, args...)
	if os.Getenv(envRequire) == "require" {
		t.Fatalf("needed here and missing: %s (test/deps.sh installs what Debian has)", what)
	}
	fmt.Fprintf(os.Stderr, "SKIPPED %s: missing: %s (test/deps.sh installs what Debian has)\n", t.Name(), what)
	t.Skipf("missing: %s", what)
}

// note says what a test that goes on leaves out here; make test shows it.
func note(t testing.TB, format string, args ...any) {
	fmt.Fprintf(os.Stderr, "NOTE: %s: %s\n", t.Name(), fmt.Sprintf(format, args...))
}

// need skips the test unless namespaces work and the commands exist.
func need(t testing.TB, commands ...string) {
	t.Helper()
	if notReady != "" {
		missing(t, "%s", notReady)
	}
	for _, c := range commands {
		if _, err := exec.LookPath(c); err != nil {
			missing(t, "command %s", c)
		}
	}
}

// long skips a test that is too slow for every run; make test-long sets the
// variable.
func long(t testing.TB) {
	t.Helper()
	if on, _ := strconv.ParseBool(os.Getenv(envLong)); !on {
		t.Skipf("long: run with %s=1", envLong)
	}
}
