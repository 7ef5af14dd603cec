package nsagent

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func init() {
	guestTests = append(guestTests,
		guestTest{"join_process", testJoinProcess},
		guestTest{"join_leaves_nothing", testJoinLeavesNothing},
		guestTest{"join_path", testJoinPath},
		guestTest{"join_user_namespace_as_root", testJoinUserNamespaceAsRoot},
		guestTest{"join_process_ends", testJoinProcessEnds},
		guestTest{"join_refused", testJoinRefused},
	)
}

// foreign is a network namespace that somebody else made, with a process in it.
type foreign struct {
	pid  int
	user bool // it has a user namespace of its own
}

// newForeign makes one; as an ordinary user inside a user namespace.
func newForeign(t testing.TB, user bool) *foreign {
	t.Helper()
	args := []string{"-n"}
	if user {
		args = []string{"-U", "-r", "-n"}
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	c := exec.Command("unshare", append(args, "sh", "-c", "echo ready; exec sleep 1000")...)
	c.Stdout, c.Stderr = w, w
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	t.Cleanup(func() {
		c.Process.Kill()
		c.Wait()
	})
	b := make([]byte, 64)
	n, _ := r.Read(b)
	if string(b[:n]) != "ready\n" {
		t.Fatalf("make a namespace: %q", b[:n])
	}
	return &foreign{c.Process.Pid, user}
}

// sh runs a script in it without any help of ours.
func (f *foreign) sh(t testing.TB, script string) string {
	t.Helper()
	args := []string{"-t", fmt.Sprint(f.pid), "-n"}
	if f.user {
		args = append(args, "-U", "--preserve-credentials")
	}
	out, err := exec.Command("nsenter", append(args, "sh", "-c", script)...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", script, err, out)
	}
	return strings.TrimSuffix(string(out), "\n")
}

// foreignState is what joining changes.
const foreignState = `ip -br addr; ip route; ip -6 route; nft list ruleset; `

// foreignKernelState is what the kernel path changes, which nobody takes back when the
// agent is killed.
const foreignKernelState = `
ip rule; ip -6 rule; ip route show table all | grep 7965; ip -6 route show table all | grep 7965
for d in all default lo; do cat /proc/sys/net/ipv4/conf/$d/rp_filter /proc/sys/net/ipv4/conf/$d/accept_local; done
`

// foreignSysctl is another thing, which cannot be taken back in a user namespace with a
// single group.
const foreignSysctl = `cat /proc/sys/net/ipv4/ping_group_range`

// joinSpec is a guest in f.
func joinSpec(t testing.TB, j Join) Spec {
	spec := testSpec(t)
	spec.Join = &j
	return spec
}

func ordinaryUser() bool { return os.Geteuid() != 0 }

func testJoinProcess(t *testing.T) {
	f := newForeign(t, ordinaryUser())
	g := start(t, joinSpec(t, Join{PID: f.pid}))
	if r := g.Report(); r.SNAT+r.IPv6+r.PingNote+r.Kernel+r.Kernel6 != "" {
		t.Errorf("complaints: %+v", r)
	}
	if same, err := sameFile(g.NetNS(), fmt.Sprintf("/proc/%d/ns/net", f.pid)); err != nil || !same {
		t.Errorf("NetNS is another namespace (%v)", err)
	}
	for _, state := range []string{f.sh(t, foreignState), g.sh(t, foreignState)} {
		for _, want := range []string{
			"192.168.65.3/24", "default via 192.168.65.1", "default via fdc4:f303:9324::1", "snat to ip6 saddr", "127.0.0.1/8",
		} {
			if !strings.Contains(state, want) {
				t.Errorf("no %q in\n%s", want, state)
			}
		}
	}
	g.sh(t, "ping -n -c 1 -W 5 127.0.0.1")
	// Only one at a time.
	_, err := Start(t.Context(), joinSpec(t, Join{PID: f.pid}), slog.New(slog.DiscardHandler))
	if !errors.Is(err, ErrHasDefaultRoute) {
		t.Errorf("a second one: %v", err)
	}
}

func testJoinLeavesNothing(t *testing.T) {
	f := newForeign(t, ordinaryUser())
	state := foreignState + foreignKernelState
	if !ordinaryUser() && wholeHost(t) {
		state += foreignSysctl
	}
	before, kernelBefore := f.sh(t, state), f.sh(t, foreignKernelState)
	g := start(t, joinSpec(t, Join{PID: f.pid}))
	if f.sh(t, state) == before {
		t.Fatal("nothing changed")
	}
	end(t, g.Agent)
	if after := f.sh(t, state); after != before {
		t.Errorf("before:\n%s\nafter Close:\n%s", before, after)
	}
	// What needs somebody to take it back is lo and the sysctl; the rest goes even
	// when the agent is killed.
	g = start(t, joinSpec(t, Join{PID: f.pid}))
	unix.Kill(g.PID(), unix.SIGKILL)
	<-g.Done()
	end(t, g.Agent)
	after := f.sh(t, foreignState)
	for _, not := range []string{"slipway", "192.168.65", "default"} {
		if strings.Contains(after, not) {
			t.Errorf("%q after the agent was killed:\n%s", not, after)
		}
	}
	// And once more; what the killed one has left goes with the next.
	g = start(t, joinSpec(t, Join{PID: f.pid}))
	kernelWorks(t, g)
	end(t, g.Agent)
	if after, want := f.sh(t, foreignKernelState), kernelBefore; after != want {
		t.Errorf("after the next one:\n%s\nwant\n%s", after, want)
	}
}

func testJoinPath(t *testing.T) {
	f := newForeign(t, ordinaryUser())
	proc := fmt.Sprintf("/proc/%d/ns/net", f.pid)
	g := start(t, joinSpec(t, Join{NetNS: proc}))
	if got := g.sh(t, "ip -o link show slipway0 | wc -l"); got != "1" {
		t.Errorf("%s devices", got)
	}
	end(t, g.Agent)
	if ordinaryUser() {
		return // only root can mount a name for it
	}
	path := filepath.Join(t.TempDir(), "name")
	if err := os.WriteFile(path, nil, 0o444); err != nil {
		t.Fatal(err)
	}
	for _, remove := range []bool{false, true} {
		if err := unix.Mount(proc, path, "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
		g := start(t, joinSpec(t, Join{NetNS: path}))
		select {
		case <-g.Done():
			t.Error("done at once")
		default:
		}
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
			t.Fatal(err)
		}
		if remove {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		}
		<-g.Done()
		end(t, g.Agent)
	}
}

// Root serves the namespaces of others without becoming a user there.
func testJoinUserNamespaceAsRoot(t *testing.T) {
	if ordinaryUser() {
		return
	}
	f := newForeign(t, true)
	g := start(t, joinSpec(t, Join{PID: f.pid}))
	if got := g.sh(t, "ip -o link show slipway0 | wc -l"); got != "1" {
		t.Errorf("%s devices", got)
	}
}

func testJoinProcessEnds(t *testing.T) {
	f := newForeign(t, ordinaryUser())
	g := start(t, joinSpec(t, Join{PID: f.pid}))
	p, err := g.Exec(t.Context(), Command{Args: []string{"sleep", "1000"}, Env: os.Environ()})
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-g.Done():
		t.Error("done at once")
	default:
	}
	unix.Kill(f.pid, unix.SIGKILL)
	<-g.Done()
	end(t, g.Agent)
	if st, err := p.Wait(); err != nil || st.Signal == nil {
		t.Errorf("status %+v, error %v", st, err)
	}
}

func testJoinRefused(t *testing.T) {
	f := newForeign(t, ordinaryUser())
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	join := func(j Join) error {
		t.Helper()
		g, err := Start(t.Context(), joinSpec(t, j), slog.New(slog.DiscardHandler))
		if err == nil {
			end(t, g)
			t.Fatalf("joined %+v", j)
		}
		return err
	}
	hinted(t, join(Join{PID: os.Getpid()}), "name a process")
	hinted(t, join(Join{NetNS: file}), "/run/netns/NAME")
	hinted(t, join(Join{NetNS: fmt.Sprintf("/proc/%d/ns/mnt", f.pid)}), "/run/netns/NAME")
	if err := join(Join{NetNS: file + ".missing"}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing path: %v", err)
	}
	if err := join(Join{PID: 1 << 22}); !errors.Is(err, unix.ESRCH) && !errors.Is(err, unix.EINVAL) {
		t.Errorf("missing process: %v", err)
	}
	join(Join{})
	join(Join{PID: f.pid, NetNS: file})
	if ordinaryUser() {
		hinted(t, join(Join{PID: 1}), "as root")
	}

	f.sh(t, "ip link add d0 type veth peer name d1; ip link set d1 up; ip addr add 203.0.113.2/24 dev d0; ip link set d0 up; ip route add default via 203.0.113.1")
	const state = `ip -o link | wc -l; ip route; nft list ruleset; ` + foreignSysctl
	before := f.sh(t, state)
	err := join(Join{PID: f.pid})
	hinted(t, err, "ip route del default")
	if !errors.Is(err, ErrHasDefaultRoute) {
		t.Errorf("error %v", err)
	}
	if after := f.sh(t, state); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	f.sh(t, "ip route del default; ip addr add 2001:db8::2/64 dev d0 nodad; ip route add default via 2001:db8::1")
	hinted(t, join(Join{PID: f.pid}), "ip -6 route del default")

	t.Setenv("PATH", t.TempDir())
	hinted(t, join(Join{PID: f.pid}), "util-linux")
}
