//go:build linux

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// congestion is the congestion control of every namespace, so that bulk rows
// compare drivers and not BBR with cubic.
const congestion = "cubic"

// Addresses are from the documentation ranges (RFC 5737, RFC 3849).
var (
	hostAddr  = netip.MustParseAddr("198.51.100.1") // host's side of the veth to world
	worldAddr = netip.MustParseAddr("198.51.100.2") // what the guest talks to
	guestAddr = netip.MustParseAddr("203.0.113.3")  // guest's own, where veth joins it

	hostAddr6  = netip.MustParseAddr("2001:db8:100::1")
	worldAddr6 = netip.MustParseAddr("2001:db8:100::2")
	guestAddr6 = netip.MustParseAddr("2001:db8:113::3")
)

// Names of the namespaces under /run/netns.
const (
	nsHost  = "host"
	nsWorld = "world"
	nsGuest = "guest"
)

// topology is the set of fresh namespaces of one sample.
type topology struct {
	dir    string // holds the binaries; see prepareBinaries
	ipv6   bool   // there are IPv6 addresses
	world  *exec.Cmd
	ask    io.WriteCloser // a line here makes world report
	answer *bufio.Reader
}

// newTopology makes host and world, joined by veth, and starts the server. IPv6 is
// there only for the rows that use it: configuring it takes some drivers longer to
// start.
func newTopology(ctx context.Context, dir string, ipv6 bool) (*topology, error) {
	t := &topology{dir: dir, ipv6: ipv6}
	err := firstError(
		func() error { return ipBatch("", "netns add host", "netns add world") },
		func() error {
			return ipBatch(nsHost, "link set lo up",
				"link add world0 mtu 1500 type veth peer name host0 mtu 1500 netns world",
				"addr add 198.51.100.1/24 dev world0", "link set world0 up",
				// A default route: pasta and slipway look for one to copy.
				"route add default via 198.51.100.2")
		},
		func() error {
			return ipBatch(nsWorld, "link set lo up", "addr add 198.51.100.2/24 dev host0", "link set host0 up")
		},
		func() error {
			return t.ipBatch6(nsHost, "addr add 2001:db8:100::1/64 dev world0 nodad", "route add default via 2001:db8:100::2")
		},
		func() error { return t.ipBatch6(nsWorld, "addr add 2001:db8:100::2/64 dev host0 nodad") },
		func() error { return useCubic(nsHost) },
		func() error { return useCubic(nsWorld) },
		func() error { return t.startWorld(ctx) },
	)
	if err != nil {
		t.close()
		return nil, fmt.Errorf("topology: %w", err)
	}
	return t, nil
}

// addGuest makes the guest's namespace, for the drivers that are given one.
func (t *topology) addGuest() error {
	return firstError(
		func() error { return ipBatch("", "netns add guest") },
		func() error { return ipBatch(nsGuest, "link set lo up") },
	)
}

// ipBatch6 is ipBatch, for topologies that have IPv6.
func (t *topology) ipBatch6(ns string, lines ...string) error {
	if !t.ipv6 {
		return nil
	}
	return ipBatch(ns, lines...)
}

// startWorld starts the server and waits until it listens.
func (t *topology) startWorld(ctx context.Context) error {
	cmd := exec.CommandContext(ctx, filepath.Join(t.dir, "bench"), argWorld)
	cmd.Stderr = os.Stderr
	var err error
	if t.ask, err = cmd.StdinPipe(); err != nil {
		return err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	t.answer = bufio.NewReader(out)
	if err := startIn(nsWorld, cmd); err != nil {
		return err
	}
	t.world = cmd
	line, err := t.answer.ReadString('\n')
	if line != "ready\n" {
		return fmt.Errorf("world's server said %q: %w", line, cmpErr(err, errors.New("not ready")))
	}
	return nil
}

// report asks the server what it has seen.
func (t *topology) report() (worldReport, error) {
	var r worldReport
	if _, err := fmt.Fprintln(t.ask); err != nil {
		return r, fmt.Errorf("world's server: %w", err)
	}
	line, err := t.answer.ReadBytes('\n')
	if err != nil {
		return r, fmt.Errorf("world's server: %w", err)
	}
	return r, json.Unmarshal(line, &r)
}

// timeWait counts the sockets in TIME_WAIT in namespace ns.
func timeWait(ns string) (n float64, err error) {
	err = inNamespace(ns, func() error {
		text, err := os.ReadFile("/proc/thread-self/net/sockstat")
		if err != nil {
			return err
		}
		n, err = timeWaitIn(string(text))
		return err
	})
	return n, err
}

// timeWaitIn reads "TCP: inuse 2 orphan 0 tw 7 alloc 3 mem 1", which counts both
// families.
func timeWaitIn(sockstat string) (float64, error) {
	_, rest, _ := strings.Cut(sockstat, "\nTCP: ")
	f := strings.Fields(rest)
	for i := 0; i+1 < len(f); i += 2 {
		if f[i] == "tw" {
			return strconv.ParseFloat(f[i+1], 64)
		}
	}
	return 0, errors.New("sockstat: no count of TIME_WAIT")
}

// devices returns the counters of world's devices.
func (t *topology) devices() (devs map[string]device, err error) {
	err = inNamespace(nsWorld, func() error {
		devs, err = readDevices()
		return err
	})
	return devs, err
}

// close ends the server and deletes the namespaces.
func (t *topology) close() {
	if t.world != nil {
		t.ask.Close()
		endProcess(t.world)
	}
	for _, ns := range []string{nsGuest, nsHost, nsWorld} {
		if _, err := os.Stat(filepath.Join("/run/netns", ns)); err == nil {
			_ = ipBatch("", "netns del "+ns)
		}
	}
	reap()
}

// reap collects the orphans that became ours as the first process of the pid
// namespace. Nobody may wait for a child of his own meanwhile.
func reap() {
	for {
		if pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); pid <= 0 && err != unix.EINTR {
			return
		}
	}
}

// ipBatch runs lines of ip(8) commands inside namespace ns ("" is our own).
func ipBatch(ns string, lines ...string) error {
	args := []string{"-batch", "-"}
	if ns != "" {
		args = append([]string{"-n", ns}, args...)
	}
	cmd := exec.Command("ip", args...)
	cmd.Stdin = strings.NewReader(strings.Join(lines, "\n") + "\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("ip %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return nil
}

// useCubic sets the congestion control of ns and checks it.
func useCubic(ns string) error {
	return setSysctl(ns, "net/ipv4/tcp_congestion_control", congestion)
}

// setSysctl writes a per-namespace sysctl.
func setSysctl(ns, name, value string) error {
	return inNamespace(ns, func() error {
		return os.WriteFile(filepath.Join("/proc/sys", name), []byte(value), 0)
	})
}

// namespaceID returns the inode of namespace ns.
func namespaceID(ns string) (uint64, error) { return inode(filepath.Join("/run/netns", ns)) }

// startIn starts cmd in network namespace ns: a child inherits the namespace of
// the thread that forks it.
func startIn(ns string, cmd *exec.Cmd) error { return inNamespace(ns, cmd.Start) }

// inNamespace runs f on a thread in network namespace ns. The thread is given up
// when it cannot go back.
func inNamespace(ns string, f func() error) error {
	return inNamespaceOf(filepath.Join("/run/netns", ns), f)
}

// inNamespaceOf does so with the namespace that is the file path.
func inNamespaceOf(path string, f func() error) error {
	runtime.LockOSThread()
	own, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer own.Close()
	there, err := os.Open(path)
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer there.Close()
	if err := unix.Setns(int(there.Fd()), unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("setns %s: %w", path, err)
	}
	err = f()
	if back := unix.Setns(int(own.Fd()), unix.CLONE_NEWNET); back != nil {
		return errors.Join(err, fmt.Errorf("setns back: %w", back)) // stays locked
	}
	runtime.UnlockOSThread()
	return err
}

// endProcess asks a process to end, kills it after two seconds, and waits.
func endProcess(cmd *exec.Cmd) {
	_ = cmd.Process.Signal(unix.SIGTERM)
	timer := time.AfterFunc(2*time.Second, func() { _ = cmd.Process.Kill() })
	defer timer.Stop()
	_ = cmd.Wait()
}

// firstError runs steps until one fails.
func firstError(steps ...func() error) error {
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// complaint returns what a program said on stderr: slipway's error is not its last
// line where a hint follows.
func complaint(out []byte) string {
	for _, line := range strings.Split(string(out), "\n") {
		if strings.HasPrefix(line, "slipway: ") {
			return line
		}
	}
	return lastLine(out)
}

// lastLine returns the last line of a program's output that is not empty.
func lastLine(out []byte) string {
	s := strings.TrimSpace(string(out))
	return s[strings.LastIndexByte(s, '\n')+1:]
}
