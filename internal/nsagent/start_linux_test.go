package nsagent

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func init() {
	guestTests = append(guestTests,
		guestTest{"network", testNetwork},
		guestTest{"no_default_routes", testNoDefaultRoutes},
		guestTest{"mapping", testMapping},
		guestTest{"capabilities", testCapabilities},
		guestTest{"ping", testPing},
		guestTest{"tun", testTUN},
		guestTest{"bad_spec", testBadSpec},
		guestTest{"start_cancelled", testStartCancelled},
		guestTest{"no_tun_device", testNoTUNDevice},
		guestTest{"map_tool_fails", testMapToolFails},
		guestTest{"no_more_user_namespaces", testNoMoreUserNamespaces},
		guestTest{"two_at_once", testTwoAtOnce},
	)
}

func testNetwork(t *testing.T) {
	spec := testSpec(t)
	spec.TUN.MTU = 1400
	spec.Mirror = []netip.Prefix{
		netip.MustParsePrefix("10.1.2.3/16"),
		netip.MustParsePrefix("10.1.0.0/16"), // twice is not an error
		netip.MustParsePrefix("2001:db8::/32"),
	}
	g := start(t, spec)
	if r := g.Report(); r.SNAT+r.Sys+r.IPv6+r.PingNote != "" || len(r.Names)+len(r.Routes) > 0 {
		t.Errorf("complaints: %+v", r)
	}
	routes := g.sh(t, "ip -4 route; ip -6 route")
	for _, want := range []string{
		"default via 192.168.65.1 dev slipway0",
		"10.1.0.0/16 via 192.168.65.1 dev slipway0",
		"default via fdc4:f303:9324::1 dev slipway0",
		"2001:db8::/32 via fdc4:f303:9324::1 dev slipway0",
	} {
		if !strings.Contains(routes, want) {
			t.Errorf("no route %q in\n%s", want, routes)
		}
	}
	link := g.sh(t, "ip addr show slipway0; ip addr show lo")
	for _, want := range []string{
		"mtu 1400", "qlen 10000", "inet 192.168.65.3/24", "inet6 fdc4:f303:9324::3/64 scope global nodad",
		"inet 127.0.0.1/8", "inet6 ::1/128",
	} {
		if !strings.Contains(link, want) {
			t.Errorf("no %q in\n%s", want, link)
		}
	}
	for _, not := range []string{"tentative", "fe80:", "3: "} {
		if strings.Contains(link, not) {
			t.Errorf("%q in\n%s", not, link)
		}
	}
	if got := g.sh(t, "ls /sys/class/net | xargs"); got != "lo slipway0" {
		t.Errorf("/sys/class/net shows %q", got)
	}
}

func testNoDefaultRoutes(t *testing.T) {
	spec := testSpec(t)
	spec.Default4, spec.Default6 = false, false
	g := start(t, spec)
	routes := g.sh(t, "ip -4 route show type unreachable; ip -6 route")
	for _, want := range []string{"unreachable default \n", "unreachable default dev lo"} {
		if !strings.Contains(routes, want) {
			t.Errorf("no %q in\n%s", want, routes)
		}
	}
}

func testMapping(t *testing.T) {
	g := start(t, testSpec(t))
	want := map[string]struct {
		kind Mapping
		uids string
	}{
		"root":             {MappingNone, "0 0 4294967295"},
		"rootless_as_root": {MappingIdentity, "0 0 4294967295"},
		"rootless_ranges":  {MappingRanges, "0 1 1\n1 200000 65536"},
		"rootless_single":  {MappingSingle, "0 1 1"},
	}[os.Getenv(envMode)]
	r := g.Report()
	if os.Getenv("TMPDIR") == "/tmp" && (os.Geteuid() != 0 || wholeHost(t)) { // else the tester's own IDs
		if r.Mapping != want.kind {
			t.Errorf("mapping %q, want %q", r.Mapping, want.kind)
		}
		if got := g.sh(t, `while read -r a b c; do echo $a $b $c; done </proc/self/uid_map`); got != want.uids {
			t.Errorf("uid_map %q, want %q", got, want.uids)
		}
	}
	if (r.Mapping == MappingSingle) != (r.MappingNote != "") {
		t.Errorf("mapping %q with note %q", r.Mapping, r.MappingNote)
	}
	if got := g.sh(t, "id -u; id -g"); got != "0\n0" {
		t.Errorf("id is %q, want root", got)
	}
	file := filepath.Join(t.TempDir(), "made")
	g.sh(t, "touch "+file)
	info, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	if got := info.Sys().(*syscall.Stat_t).Uid; int(got) != os.Geteuid() {
		t.Errorf("a file made by the guest's root belongs to %d, want %d", got, os.Geteuid())
	}
}

// Commands are root with every capability that their user namespace may have, and no
// trace of the agent's ambient ones.
func testCapabilities(t *testing.T) {
	g := start(t, testSpec(t))
	caps := g.sh(t, `grep -E "^Cap(Inh|Amb|Eff|Bnd)" /proc/self/status | cut -f2 | xargs`)
	f := strings.Fields(caps)
	const none = "0000000000000000"
	if len(f) != 4 || f[0] != none || f[3] != none || f[1] != f[2] || f[1] == none {
		t.Errorf("inheritable, effective, bounding, ambient capabilities: %q", caps)
	}
}

func testPing(t *testing.T) {
	g := start(t, testSpec(t))
	want := map[Mapping]string{
		MappingNone: "0 2147483647", MappingIdentity: "0 2147483647",
		MappingRanges: "0 65536", MappingSingle: "0 0",
	}[g.Report().Mapping]
	if got := g.Report().PingRange; got != want && (os.Geteuid() != 0 || wholeHost(t)) {
		t.Errorf("ping range %q, want %q (%s)", got, want, g.Report().PingNote)
	}
	g.sh(t, "ping -n -c 1 -W 5 127.0.0.1")
}

// The device is non-blocking, has the virtio-net header, and goes with its last
// descriptor, since the agent has none.
func testTUN(t *testing.T) {
	g := start(t, testSpec(t))
	fd, err := rawFD(g.TUN())
	if err != nil {
		t.Fatal(err)
	}
	if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0); err != nil || flags&unix.O_NONBLOCK == 0 {
		t.Errorf("flags %#x, error %v: not non-blocking", flags, err)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, 12); err != nil {
		t.Errorf("no virtio-net header: %v", err)
	}
	p, err := g.Exec(t.Context(), Command{Args: []string{"ping", "-c1", "-W1", "198.51.100.1"}, Env: os.Environ()})
	if err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 2048)
	n, err := g.TUN().Read(buf)
	if err != nil || n != 12+84 || buf[12]>>4 != 4 {
		t.Errorf("read % x, error %v; want an echo request behind 12 bytes", buf[:n], err)
	}
	p.Signal(syscall.SIGKILL)
	p.Wait()
	g.TUN().Close()
	g.mu.Lock()
	unix.Close(g.spare)
	g.spare = -1
	g.mu.Unlock()
	if got := g.sh(t, "ls /sys/class/net"); got != "lo" {
		t.Errorf("devices after the TUN was closed: %q", got)
	}
}

func testBadSpec(t *testing.T) {
	spec := testSpec(t)
	spec.TUN = TUN{Name: "a/b", MTU: 100}
	spec.Gateway4 = netip.MustParseAddr("203.0.113.1")
	_, err := Start(t.Context(), spec, slog.New(slog.DiscardHandler))
	if err == nil {
		t.Fatal("started")
	}
	for _, want := range []string{`"a/b"`, "mtu: 100", "203.0.113.1"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q does not mention %q", err, want)
		}
	}
	spec = testSpec(t)
	spec.Hosts = filepath.Join(t.TempDir(), "missing")
	_, err = Start(t.Context(), spec, slog.New(slog.DiscardHandler))
	if !errors.Is(err, fs.ErrNotExist) || !strings.HasPrefix(err.Error(), "open on "+spec.Hosts) {
		t.Errorf("missing hosts file: %v", err)
	}
}

func testStartCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Start(ctx, testSpec(t), slog.New(slog.DiscardHandler)); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
}

// hinted fails the test unless err is an *Error with this hint in it.
func hinted(t *testing.T, err error, hint string) {
	t.Helper()
	var e *Error
	if !errors.As(err, &e) || !strings.Contains(e.Hint, hint) {
		t.Fatalf("error %#v (%v), want an Error whose hint has %q", err, err, hint)
	}
	if strings.Contains(err.Error(), "\n") || err.Error() == "" {
		t.Errorf("not one line: %q", err)
	}
}

func testNoTUNDevice(t *testing.T) {
	hostTest(t)
	if os.Geteuid() != 0 {
		return // only root can cover it; the other modes do
	}
	// A node without a driver, as in a container without --device.
	if err := unix.Mount("/dev/null", "/dev/net/tun", "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount("/dev/net/tun", unix.MNT_DETACH)
	_, err := Start(t.Context(), testSpec(t), slog.New(slog.DiscardHandler))
	var e *Error
	if !errors.As(err, &e) || e.Op != "create TUN" {
		t.Errorf("/dev/null as the driver: %v", err)
	}
	for cause, hint := range map[syscall.Errno]string{
		unix.ENOENT: "modprobe tun", unix.ENODEV: "modprobe tun",
		unix.EACCES: "chmod 0666", unix.EPERM: "--device", unix.EBUSY: "another slipway",
	} {
		if got := tunHint(cause); !strings.Contains(got, hint) {
			t.Errorf("%v: hint %q", cause, got)
		}
	}
}

func testMapToolFails(t *testing.T) {
	if modes[mode()].name != "rootless_ranges" {
		return // others do not run it
	}
	dir := t.TempDir()
	for _, tool := range []string{"newuidmap", "newgidmap"} {
		if err := os.WriteFile(filepath.Join(dir, tool), []byte("#!/bin/sh\necho denied by test >&2; exit 1\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir)
	_, err := Start(t.Context(), testSpec(t), slog.New(slog.DiscardHandler))
	hinted(t, err, "/etc/subuid")
	if want := "map users on newuidmap: denied by test"; err.Error() != want {
		t.Errorf("error %q, want %q", err, want)
	}
	t.Setenv("PATH", t.TempDir())
	if r := start(t, testSpec(t)).Report(); r.Mapping != MappingSingle || !strings.Contains(r.MappingNote, "apt-get install uidmap") {
		t.Errorf("without the tools: %+v", r)
	}
}

// A user namespace of our own with a limit of none in it forbids more of them.
func testNoMoreUserNamespaces(t *testing.T) {
	if !modes[mode()].rootless {
		return
	}
	g := start(t, testSpec(t))
	out := g.sh(t, `echo 0 >/proc/sys/user/max_user_namespaces && unshare -U true 2>&1 || true`)
	if !strings.Contains(out, "No space left") {
		t.Fatalf("the kernel says %q", out)
	}
	err := userNamespaceError(unix.ENOSPC)
	hinted(t, err, "user.max_user_namespaces")
	hinted(t, userNamespaceError(unix.EPERM), "sandbox")
}

func testTwoAtOnce(t *testing.T) {
	a, b := start(t, testSpec(t)), start(t, testSpec(t))
	if same, err := sameFile(a.NetNS(), "/proc/self/ns/net"); err != nil || same {
		t.Errorf("the guest has our network namespace (%v)", err)
	}
	if x, y := a.sh(t, "readlink /proc/self/ns/net"), b.sh(t, "readlink /proc/self/ns/net"); x == y {
		t.Errorf("both guests are in %s", x)
	}
}
