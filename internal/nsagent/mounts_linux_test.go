package nsagent

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func init() {
	guestTests = append(guestTests,
		guestTest{"names", testNames},
		guestTest{"names_rewritten", testNamesRewritten},
		guestTest{"names_replaced", testNamesReplaced},
		guestTest{"names_links", testNamesLinks},
		guestTest{"names_removed", testNamesRemoved},
		guestTest{"names_unmounted", testNamesUnmounted},
		guestTest{"propagation", testPropagation},
		guestTest{"private_mounts", testPrivateMounts},
		guestTest{"sys", testSys},
	)
}

const readNames = "cat /etc/resolv.conf /etc/hosts"
const ourNames = "nameserver 192.168.65.1\n127.0.0.1 our-hosts"

func testNames(t *testing.T) {
	spec := testSpec(t)
	g := start(t, spec)
	if got := g.sh(t, readNames); got != ourNames {
		t.Errorf("the guest sees %q", got)
	}
	if b, err := os.ReadFile("/etc/hosts"); err == nil && strings.Contains(string(b), "our-hosts") {
		t.Error("the host sees our file")
	}
	spec.ResolvConf = "" // leave the host's
	h := start(t, spec)
	want, err := os.ReadFile("/etc/resolv.conf")
	if err != nil {
		t.Fatal(err)
	}
	if got := h.sh(t, "cat /etc/resolv.conf"); got != strings.TrimSuffix(string(want), "\n") {
		t.Errorf("the guest sees %q, want the host's %q", got, want)
	}
}

// The daemon rewrites its files in place.
func testNamesRewritten(t *testing.T) {
	spec := testSpec(t)
	g := start(t, spec)
	if err := os.WriteFile(spec.Hosts, []byte("new\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if got := g.sh(t, "cat /etc/hosts"); got != "new" {
		t.Errorf("the guest sees %q", got)
	}
}

// replace puts a new file in place of path, as editors and resolvers do.
func replace(t testing.TB, path, text string) {
	t.Helper()
	if err := os.WriteFile(path+".tmp", []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".tmp", path); err != nil {
		t.Fatal(err)
	}
}

// link makes path a symbolic link to target, in place of what it was.
func link(t testing.TB, path, target string) {
	t.Helper()
	if err := os.Symlink(target, path+".tmp"); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".tmp", path); err != nil {
		t.Fatal(err)
	}
}

// keepEtc restores what a test does to the names.
func keepEtc(t testing.TB) {
	t.Helper()
	hostTest(t)
	for _, path := range []string{"/etc/resolv.conf", "/etc/hosts"} {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { replace(t, path, string(b)) })
	}
}

// mended waits until the guest sees our files again.
func (g *testGuest) mended(t testing.TB) {
	t.Helper()
	defer func() {
		if t.Failed() {
			t.Logf("log: %s\nmounts: %s", g.log, g.sh(t, "grep /etc /proc/self/mountinfo; ls -l /etc/hosts /etc/resolv.conf; "+readNames))
		}
	}()
	eventually(t, "our names are back in the guest", func() bool {
		out, _ := g.output(t, Command{Args: []string{"sh", "-c", readNames}})
		return out == ourNames
	})
}

func testNamesReplaced(t *testing.T) {
	keepEtc(t)
	g := start(t, testSpec(t))
	for i := range 5 {
		replace(t, "/etc/resolv.conf", fmt.Sprintf("nameserver 203.0.113.%d\n", i))
		replace(t, "/etc/hosts", "127.0.0.1 theirs\n")
		g.mended(t)
	}
	if b, _ := os.ReadFile("/etc/resolv.conf"); string(b) != "nameserver 203.0.113.4\n" {
		t.Errorf("the host's file is %q", b)
	}
	eventually(t, "a line in the log", func() bool { return strings.Contains(g.log.String(), "mounted ours again") })
}

// A link is covered itself: it may dangle, its target may be replaced, and it may be
// pointed elsewhere.
func testNamesLinks(t *testing.T) {
	keepEtc(t)
	dir := t.TempDir()
	target := filepath.Join(dir, "stub-resolv.conf")
	link(t, "/etc/resolv.conf", target)
	g := start(t, testSpec(t)) // dangling
	g.mended(t)
	if len(g.Report().Names) > 0 {
		t.Errorf("complaints: %v", g.Report().Names)
	}
	replace(t, target, "nameserver 127.0.0.53\n")
	g.mended(t)
	replace(t, target, "nameserver 127.0.0.54\n")
	g.mended(t)
	other := filepath.Join(dir, "other")
	replace(t, other, "nameserver 203.0.113.9\n")
	link(t, "/etc/resolv.conf", other)
	g.mended(t)
	link(t, "/etc/resolv.conf", "../"+strings.Repeat("../", 20)+strings.TrimPrefix(target, "/"))
	g.mended(t)
	if b, _ := os.ReadFile(target); string(b) != "nameserver 127.0.0.54\n" {
		t.Errorf("the target is now %q", b)
	}
}

func testNamesRemoved(t *testing.T) {
	keepEtc(t)
	if err := os.Remove("/etc/resolv.conf"); err != nil {
		t.Fatal(err)
	}
	g := start(t, testSpec(t))
	if r := g.Report().Names; len(r) != 1 || !strings.HasPrefix(r[0], "/etc/resolv.conf: the host has none") {
		t.Errorf("complaints: %v", r)
	}
	for range 2 {
		if err := os.WriteFile("/etc/resolv.conf", []byte("nameserver 203.0.113.1\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		g.mended(t)
		if err := os.Remove("/etc/resolv.conf"); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the name is gone in the guest, too", func() bool {
			_, st := g.output(t, Command{Args: []string{"test", "-e", "/etc/resolv.conf"}})
			return st.Code == 1
		})
	}
	replace(t, "/etc/resolv.conf", "nameserver 203.0.113.1\n")
	g.mended(t)
}

// The guest's root may unmount our file, by mistake; and may cover it, on purpose.
func testNamesUnmounted(t *testing.T) {
	g := start(t, testSpec(t))
	g.sh(t, "umount /etc/resolv.conf")
	g.mended(t)
	g.sh(t, "echo theirs >"+t.TempDir()+"/f; mount --bind $OLDPWD/dev/null /etc/hosts 2>/dev/null || mount --bind /dev/null /etc/hosts")
	g.sh(t, "mount -t tmpfs none /mnt; umount /mnt") // wakes the watch
	if got := g.sh(t, "cat /etc/hosts"); got != "" {
		t.Errorf("the guest sees %q over its own mount", got)
	}
}

// hostMount mounts a file system on the host for the time of the test.
func hostMount(t testing.TB, dir string) {
	t.Helper()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	if err := os.WriteFile(filepath.Join(dir, "on-host"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
}

func testPropagation(t *testing.T) {
	hostTest(t)
	g := start(t, testSpec(t))
	if got := g.sh(t, "findmnt -n -o PROPAGATION /"); got != "shared,slave" {
		t.Errorf("/ is %q in the guest", got)
	}
	inside := t.TempDir()
	g.sh(t, "mount -t tmpfs none "+inside+" && touch "+inside+"/in-guest")
	if _, err := os.Stat(inside + "/in-guest"); err == nil {
		t.Error("a mount in the guest shows on the host")
	}
	if os.Geteuid() != 0 {
		return // the host's mounts are root's
	}
	outside := t.TempDir()
	hostMount(t, outside)
	g.sh(t, "test -e "+outside+"/on-host")
	if err := unix.Unmount(outside, 0); err != nil {
		t.Fatal(err)
	}
	if got := g.sh(t, "ls "+outside); got != "" {
		t.Errorf("the guest still has %s", got)
	}
}

func testPrivateMounts(t *testing.T) {
	hostTest(t)
	spec := testSpec(t)
	spec.PrivateMounts = true
	g := start(t, spec)
	if got := g.sh(t, "findmnt -n -o PROPAGATION /"); got != "private" {
		t.Errorf("/ is %q in the guest", got)
	}
	if os.Geteuid() != 0 {
		return
	}
	outside := t.TempDir()
	hostMount(t, outside)
	if got := g.sh(t, "ls "+outside); got != "" {
		t.Errorf("the guest sees %s", got)
	}
}

// Below /sys everything that the host had mounted is still there.
func testSys(t *testing.T) {
	list, err := mountsInside("/sys")
	if err != nil {
		missing(t, "%v", err)
	}
	want := 0
	for _, path := range list {
		if path == "/sys/fs/cgroup" {
			want++
		}
	}
	g := start(t, testSpec(t))
	if r := g.Report(); r.Sys != "" {
		missing(t, "a sysfs of the guest's own: %s", r.Sys)
	}
	if want == 0 {
		missing(t, "a mount on /sys/fs/cgroup")
	}
	count := func(text string) (n int) {
		for _, line := range strings.Split(text, "\n") {
			if strings.Contains(line, " - cgroup") {
				n++
			}
		}
		return n
	}
	host, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "/sys/fs/cgroup has what it has on the host, where groups come and go", func() bool {
		there, err := os.ReadDir("/sys/fs/cgroup")
		if err != nil {
			t.Fatal(err)
		}
		return g.sh(t, "ls -A /sys/fs/cgroup | wc -l") == fmt.Sprint(len(there))
	})
	// Each is listed twice: below the host's /sys, covered, and below the guest's.
	if in, out := count(g.sh(t, "cat /proc/self/mountinfo")), count(string(host)); in != 2*out {
		t.Errorf("%d cgroup mounts in the guest, %d on the host", in, out)
	}
	for _, path := range list {
		if path == "/sys/fs/cgroup" {
			g.sh(t, "mountpoint -q "+path+" && cat "+path+"/*/cgroup.procs "+path+"/cgroup.procs 2>/dev/null | grep -q .")
		}
	}
}
