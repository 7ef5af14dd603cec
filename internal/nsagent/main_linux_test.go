package nsagent

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/moby/sys/user"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// The tests that need namespaces run in a host of their own: TestGuests starts this
// binary again in a new mount namespace whose mounts are shared, as systemd leaves them,
// whose /etc is a copy that may be changed, and whose /dev/net/tun is for everybody. In
// there it runs guestTests once as root, rootless as root, and as an ordinary user with
// and without subordinate IDs.

const (
	envMode = "NSAGENT_TEST_MODE" // how guestTests are to start guests
	envRole = "NSAGENT_TEST_ROLE" // the binary is a helper process, not the tests
)

// modes are the ways of guestTests. uid is the host's user; "daemon" is one that every
// system has.
var modes = []struct {
	name     string
	uid      int
	rootless bool
	subids   string // lines of /etc/subuid and /etc/subgid
}{
	{name: "root"},
	{name: "rootless_as_root", rootless: true},
	{name: "rootless_ranges", uid: 1, rootless: true, subids: "daemon:200000:65536\n"},
	{name: "rootless_single", uid: 1, rootless: true, subids: "bin:200000:65536\n"},
}

// guestTest runs in one mode.
type guestTest struct {
	name string
	run  func(*testing.T)
}

// guestTests is every test that starts guests.
var guestTests []guestTest

func TestMain(m *testing.M) {
	if IsAgent() {
		Main()
	}
	switch os.Getenv(envRole) {
	case "host":
		if err := becomeHost(); err != nil {
			fmt.Fprintln(os.Stderr, "make a host for the tests:", err)
			os.Exit(1)
		}
	case "daemon":
		daemonRole()
	case "server":
		serverRole()
	case "stopper":
		stopperRole()
	}
	goleak.VerifyTestMain(m)
}

// mode returns the index in modes, or -1 in the process that `go test` started.
func mode() int {
	for i, m := range modes {
		if os.Getenv(envMode) == m.name {
			return i
		}
	}
	return -1
}

// missing skips a test that cannot run here; NETNS_TESTS=require makes it fail.
func missing(t testing.TB, format string, args ...any) {
	t.Helper()
	why := "MISSING: " + fmt.Sprintf(format, args...)
	if os.Getenv("NETNS_TESTS") == "require" {
		t.Fatal(why)
	}
	t.Skip(why)
}

func TestGuests(t *testing.T) {
	if mode() >= 0 {
		for _, g := range guestTests {
			t.Run(g.name, g.run)
		}
		return
	}
	if os.Geteuid() != 0 {
		t.Setenv(envMode, "rootless_single") // whatever mapping we get, in the host we have
		a, err := Start(t.Context(), testSpec(t), slog.New(slog.DiscardHandler))
		if err != nil {
			missing(t, "a guest: %v", err)
		}
		end(t, a)
		for _, g := range guestTests {
			t.Run(g.name, g.run)
		}
		return
	}
	for _, m := range modes {
		t.Run(m.name, func(t *testing.T) {
			t.Parallel() // they mostly wait
			if m.uid != 0 && !wholeHost(t) {
				missing(t, "root outside of user namespaces, to become other users")
			}
			runMode(t, m.name)
		})
	}
}

// wholeHost tells whether we are root outside of user namespaces, or think so.
func wholeHost(t testing.TB) bool {
	t.Helper()
	uids, err := user.CurrentProcessUIDMap()
	if err != nil {
		t.Fatal(err)
	}
	return len(uids) == 1 && uids[0] == user.IDMap{Count: 1<<32 - 1}
}

// runMode runs guestTests in a process of their own.
func runMode(t *testing.T, name string) {
	run := "-test.run=^TestGuests$"
	// go test -run TestGuests/MODE/NAME
	if f := strings.SplitN(flag.Lookup("test.run").Value.String(), "/", 3); len(f) == 3 {
		run += "/" + f[2]
	}
	c := exec.Command(selfExe, "-test.v", run, "-test.timeout=10m")
	c.Env = append(os.Environ(), envRole+"=host", envMode+"="+name, "TMPDIR=/tmp",
		"GORACE=atexit_sleep_ms=0") // the race detector makes each agent's end wait a second
	c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS}
	var out bytes.Buffer
	c.Stdout, c.Stderr = &out, &out
	err := c.Run()
	if n := strings.Count(out.String(), "MISSING: "); n > 0 {
		missing(t, "%d tests skipped:\n%s", n, &out)
	}
	if err != nil || testing.Verbose() {
		t.Logf("%s", &out)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// becomeHost makes the mount namespace we were started in the tests' host, and becomes
// the mode's user. It returns in a process that runs the tests.
func becomeHost() error {
	m := modes[mode()]
	dir, err := os.MkdirTemp("", "nsagent-etc-")
	if err != nil {
		return err
	}
	tun := filepath.Join(dir, "tun")
	for _, step := range []func() error{
		func() error { return unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "") },
		func() error { return unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=755") },
		func() error {
			// In a user namespace not everything in /etc can be read.
			out, err := exec.Command("cp", "-a", "/etc/.", dir).CombinedOutput()
			if _, missing := os.Stat(filepath.Join(dir, "passwd")); missing != nil {
				return fmt.Errorf("cp: %w: %s", err, out)
			}
			return nil
		},
		func() error {
			err := unix.Mknod(tun, unix.S_IFCHR|0o666, int(unix.Mkdev(10, 200)))
			if err == unix.EPERM { // nor a device made; then there is only root, who can use it
				return nil
			}
			if err == nil {
				err = os.Chmod(tun, 0o666) // the umask
			}
			if err == nil {
				err = unix.Mount(tun, "/dev/net/tun", "", unix.MS_BIND, "")
			}
			return err
		},
		func() error { return os.WriteFile(filepath.Join(dir, "subuid"), []byte(m.subids), 0o644) },
		func() error { return os.WriteFile(filepath.Join(dir, "subgid"), []byte(m.subids), 0o644) },
		func() error { return os.Chown(dir, m.uid, m.uid) },
		func() error { return unix.Mount(dir, "/etc", "", unix.MS_BIND, "") },
		func() error { return unix.Unmount(dir, unix.MNT_DETACH) },
		func() error { return os.Remove(dir) },
		func() error { return unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, "") },
	} {
		if err := step(); err != nil {
			return err
		}
	}
	os.Unsetenv(envRole)
	if m.uid == 0 {
		return nil
	}
	for _, step := range []func() error{
		func() error { return syscall.Setgroups(nil) },
		func() error { return syscall.Setgid(m.uid) },
		func() error { return syscall.Setuid(m.uid) },
	} {
		if err := step(); err != nil {
			return err
		}
	}
	// A process that changed its user is not its user's own (PR_SET_DUMPABLE); a new
	// program is.
	return syscall.Exec(selfExe, os.Args, os.Environ())
}

// hostTest skips what changes the host's files unless the host is the tests' own.
func hostTest(t testing.TB) {
	t.Helper()
	if os.Getenv("TMPDIR") != "/tmp" || mode() < 0 {
		missing(t, "this test changes /etc and needs root")
	}
}

// testSpec is a usual guest in the mode of this process.
func testSpec(t testing.TB) Spec {
	t.Helper()
	dir := t.TempDir()
	write := func(name, text string) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return p
	}
	m := mode()
	return Spec{
		Rootless: m >= 0 && modes[m].rootless,
		TUN:      TUN{MTU: 1500},
		Addresses: []netip.Prefix{
			netip.MustParsePrefix("192.168.65.3/24"),
			netip.MustParsePrefix("fdc4:f303:9324::3/64"),
		},
		Gateway4:     netip.MustParseAddr("192.168.65.1"),
		Gateway6:     netip.MustParseAddr("fdc4:f303:9324::1"),
		Default4:     true,
		Default6:     true,
		ResolvConf:   write("resolv.conf", "nameserver 192.168.65.1\n"),
		Hosts:        write("hosts", "127.0.0.1 our-hosts\n"),
		IdentitySNAT: true,
		KernelPath:   true,
		PingRange:    true,
		StopTimeout:  5 * time.Second,
	}
}

// lockedBuffer collects what several goroutines write.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// testGuest is a running guest.
type testGuest struct {
	*Agent
	log *lockedBuffer
}

// start starts a guest that ends with the test.
func start(t testing.TB, spec Spec) *testGuest {
	t.Helper()
	log := new(lockedBuffer)
	a, err := Start(t.Context(), spec, slog.New(slog.NewTextHandler(log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { end(t, a) })
	return &testGuest{a, log}
}

// end ends a guest in the order a daemon does.
func end(t testing.TB, a *Agent) {
	t.Helper()
	if err := a.Close(context.Background()); err != nil {
		t.Error(err)
	}
	a.TUN().Close()
	if k := a.Kernel(); k != nil {
		closeAll([]*os.File{k.Listener4, k.Listener6, k.Probe4, k.Probe6})
	}
	a.Release()
	if a.state.Exited() && !a.state.Success() { // for one, the race detector's 66
		t.Errorf("the agent ended with %v", a.state)
	}
}

// sh runs a shell script in the guest and returns what it printed, without the last
// newline. It fails the test if the script does.
func (g *testGuest) sh(t testing.TB, script string) string {
	t.Helper()
	out, st := g.output(t, Command{Args: []string{"sh", "-c", script}})
	if st.Code != 0 {
		t.Fatalf("%s: exit status %d, output %q", script, st.Code, out)
	}
	return out
}

// output runs a command in the guest to its end.
func (g *testGuest) output(t testing.TB, c Command) (string, Status) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	c.Stdout, c.Stderr = w, w
	if c.Env == nil {
		c.Env = os.Environ()
	}
	p, err := g.Exec(t.Context(), c)
	w.Close()
	if err != nil {
		t.Fatalf("%q: %v", c.Args, err)
	}
	var b bytes.Buffer
	if _, err := b.ReadFrom(r); err != nil {
		t.Fatal(err)
	}
	st, err := p.Wait()
	if err != nil {
		t.Fatalf("%q: %v", c.Args, err)
	}
	return strings.TrimSuffix(b.String(), "\n"), st
}

// eventually polls until ok, for at most 30 seconds.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(30 * time.Second); !ok(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatalf("not within 30 s: %s", what)
		}
	}
}
