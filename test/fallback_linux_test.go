package test

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/slipway-net/slipway/test/topo"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Kernels that lack something are played by a seccomp filter: the test binary starts
// itself once more, refuses itself the system calls that such a kernel refuses, and
// becomes slipway.

// envFilter names the filter and the program in the process that becomes slipway.
const envFilter = "SLIPWAY_TEST_FILTER"

// refusal is a system call with certain arguments, and what the kernel says to it.
type refusal struct {
	call  uint32
	args  map[int]uint32 // by number, from 0
	errno syscall.Errno
}

var filters = map[string][]refusal{
	"nf_tables": {
		{unix.SYS_SOCKET, map[int]uint32{0: unix.AF_NETLINK, 2: unix.NETLINK_NETFILTER}, unix.EPROTONOSUPPORT},
	},
	"TPROXY": {
		{unix.SYS_SETSOCKOPT, map[int]uint32{1: unix.SOL_IP, 2: unix.IP_TRANSPARENT}, unix.ENOPROTOOPT},
		{unix.SYS_SETSOCKOPT, map[int]uint32{1: unix.SOL_IPV6, 2: unix.IPV6_TRANSPARENT}, unix.ENOPROTOOPT},
	},
	"IPv6": {
		{unix.SYS_SOCKET, map[int]uint32{0: unix.AF_INET6}, unix.EAFNOSUPPORT},
	},
}

func init() {
	what, program, ok := strings.Cut(os.Getenv(envFilter), ":")
	if !ok {
		return
	}
	os.Unsetenv(envFilter)
	runtime.LockOSThread() // execve(2) keeps the filter of the thread that calls it
	err := refuse(filters[what])
	if err == nil {
		err = syscall.Exec(program, append([]string{program}, os.Args[1:]...), os.Environ())
	}
	fmt.Fprintln(os.Stderr, "filter:", err)
	os.Exit(125)
}

// refuse installs the filter for this thread and what it becomes.
func refuse(list []refusal) error {
	const callOffset, argsOffset = 0, 16 // struct seccomp_data
	const load, jumpEqual, ret = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, unix.BPF_RET | unix.BPF_K
	var code []unix.SockFilter
	for _, r := range list {
		var one []unix.SockFilter
		compare := func(offset int, value uint32) {
			one = append(one, unix.SockFilter{Code: load, K: uint32(offset)}, unix.SockFilter{Code: jumpEqual, K: value})
		}
		compare(callOffset, r.call)
		for i, v := range r.args {
			compare(argsOffset+8*i, v) // the low half, on little endian
		}
		one = append(one, unix.SockFilter{Code: ret, K: unix.SECCOMP_RET_ERRNO | uint32(r.errno)})
		for i := range one {
			if one[i].Code == jumpEqual { // else on to the next refusal
				one[i].Jf = uint8(len(one) - i - 1)
			}
		}
		code = append(code, one...)
	}
	code = append(code, unix.SockFilter{Code: ret, K: unix.SECCOMP_RET_ALLOW})
	// A filter of an unprivileged process must not fool a setuid program.
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	program := unix.SockFprog{Len: uint16(len(code)), Filter: &code[0]}
	return unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&program)), 0, 0)
}

// without has the tests' slipway run on a kernel without what the filter is named for.
func without(t *testing.T, what string) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(runTmp, "slipway-without-"+what)
	script := fmt.Sprintf("#!/bin/sh\nexec env '%s=%s:%s' '%s' \"$@\"\n", envFilter, what, os.Getenv(envBin), self)
	if err := os.WriteFile(name, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(name) })
	t.Setenv(envBin, name)
}

// healthDoc is more of `slipway status --json`.
type healthDoc struct {
	statusDoc
	Engine struct {
		AgentPID int `json:"agent_pid"`
	} `json:"engine"`
	Path struct {
		Configured string `json:"configured"`
		TCP        string `json:"tcp"`
		UDP        string `json:"udp"`
		Ping       string `json:"ping"`
		Why        string `json:"why"`
	} `json:"path"`
	Memory struct {
		Goroutines int `json:"goroutines"`
	} `json:"memory"`
	Flows []struct {
		Proto string `json:"proto"`
		Live  int    `json:"live"`
		Ended int    `json:"ended"`
	} `json:"flows"`
}

func readHealth(t testing.TB, e *engine) (h healthDoc) {
	t.Helper()
	r := e.call(t, "status", e.name, "--json")
	if err := json.Unmarshal([]byte(r.stdout), &h); err != nil {
		t.Fatalf("status --json: %v: %s%s", err, r.stdout, r.stderr)
	}
	return h
}

// pathFlow is more of `slipway flows --json`.
type pathFlow struct {
	flowDoc
	Path   string `json:"path"`
	Reason string `json:"reason"`
}

func readPaths(t testing.TB, e *engine) []pathFlow {
	t.Helper()
	var list struct {
		Flows []pathFlow `json:"flows"`
	}
	r := e.call(t, "flows", e.name, "--json")
	if err := json.Unmarshal([]byte(r.stdout), &list); err != nil {
		t.Fatalf("flows --json: %v: %s%s", err, r.stdout, r.stderr)
	}
	return list.Flows
}

// TestKernelLacks: on a kernel without something, auto takes netstack and says why, and
// --path kernel refuses, with the reason and what to do.
func TestKernelLacks(t *testing.T) {
	need(t, "ip", "nft")
	for _, c := range []struct {
		what    string
		why     string // in the reason
		v4, v6  string // paths of auto; empty for "no such family"
		refuses bool
	}{
		{"nf_tables", "nftables", "netstack", "netstack", true},
		{"TPROXY", "listen on", "netstack", "netstack", true},
		{"IPv6", "IPv6", "kernel", "", false},
	} {
		t.Run(c.what, func(t *testing.T) {
			without(t, c.what)
			n := newTopology(t)
			e := startEngine(t, n, engineOptions{flags: []string{"--path", "auto"}})
			expectPaths(t, e, c.v4, c.v6, c.why)
			r := finish(t, n.Host, user{}.slipway("run", "--name", newName(), "--path", "kernel", "--", "true"), 15*time.Second)
			if c.refuses {
				expectRefusal(t, r, c.why)
			} else if r.code != 0 {
				t.Errorf("--path kernel: status %d: %s", r.code, r.stderr)
			}
		})
	}
}

// expectRefusal wants exit status 125 and two lines.
func expectRefusal(t testing.TB, r result, why string) {
	t.Helper()
	lines := strings.Split(strings.TrimSpace(r.stderr), "\n")
	if r.code != 125 || len(lines) != 2 || !strings.HasPrefix(lines[0], "slipway: ") || !strings.Contains(lines[0], why) ||
		!strings.HasPrefix(lines[1], "hint: ") || r.stdout != "" {
		t.Errorf("--path kernel: status %d, expected 125, a reason with %q and a hint:\n%s%s", r.code, why, r.stdout, r.stderr)
	}
}

// expectPaths wants flows of each family to work and to take that path, and status to
// agree in both of its forms.
func expectPaths(t testing.TB, e *engine, v4, v6, why string) {
	t.Helper()
	if v4 == "kernel" && v6 == "kernel" && why == "" {
		why = "the self-test passed"
		if h := readHealth(t, e); h.Path.Why != why {
			t.Errorf("status says why: %q, expected %q", h.Path.Why, why)
		}
	}
	overall := "netstack"
	for i, want := range []string{v4, v6} {
		if want == "kernel" {
			overall = want
		}
		if want != "" {
			expectFlow(t, e, families[i], want)
		}
	}
	h := readHealth(t, e)
	if h.Path.TCP != overall || h.Path.UDP != "netstack" || h.Path.Ping != "netstack" || !strings.Contains(h.Path.Why, why) {
		t.Errorf("status has %+v, expected tcp %s and why with %q", h.Path, overall, why)
	}
	words := fmt.Sprintf("tcp %s, udp netstack, ping netstack (%s: %s)", overall, h.Path.Configured, h.Path.Why)
	if r := e.call(t, "status", e.name); r.code != 0 || !strings.Contains(r.stdout, words) {
		t.Errorf("status does not say %q: %d\n%s%s", words, r.code, r.stdout, r.stderr)
	}
	for _, f := range h.Flows {
		if f.Proto == "tcp" && f.Live+f.Ended == 0 {
			t.Errorf("status counts no flows: %+v", h.Flows)
		}
	}
}

// expectFlow opens a flow of the family, which must work and take the path.
func expectFlow(t testing.TB, e *engine, f family, path string) {
	t.Helper()
	address := transferServer(t, e.net.World, f)
	if err := transfer(e.guest, address, 1<<20, 1<<20); err != nil {
		t.Errorf("%s: %v", f.name, err)
	}
	ch := make(chan *net.TCPConn, 1)
	c := dial(t, e.guest, serve(t, e.net.World, at(f.world, 0), func(c *net.TCPConn) { ch <- c }))
	defer c.Close()
	receive(t, ch)
	local := c.LocalAddr().(*net.TCPAddr).AddrPort()
	var seen []pathFlow
	if !eventually(10*time.Second, func() bool {
		seen = slices.DeleteFunc(readPaths(t, e), func(fl pathFlow) bool {
			return fl.Proto != "tcp" || fl.Guest != netip.AddrPortFrom(local.Addr().Unmap(), local.Port())
		})
		return len(seen) == 1 && seen[0].Path == path
	}) {
		t.Errorf("%s: flows shows %+v, expected one by %s", f.name, seen, path)
	}
	r := e.call(t, "flows", e.name)
	for line := range strings.Lines(r.stdout) {
		if strings.Contains(line, local.String()) && !strings.Contains(line, path) {
			t.Errorf("flows does not show the path %s: %s", path, line)
		}
	}
}

// TestPathsShown: what status and flows say where nothing is missing.
func TestPathsShown(t *testing.T) {
	need(t, "ip", "nft")
	for _, u := range []user{{}, {rootless: true}} {
		for path, tcp := range map[string]string{"auto": "kernel", "kernel": "kernel", "netstack": "netstack"} {
			t.Run(fmt.Sprintf("%s/rootless=%v", path, u.rootless), func(t *testing.T) {
				e := startEngine(t, newTopology(t), engineOptions{user: u, flags: []string{"--path", path}})
				expectPaths(t, e, tcp, tcp, "")
				if h := readHealth(t, e); h.Path.Configured != path || h.Path.Why == "" {
					t.Errorf("status has %+v", h.Path)
				}
			})
		}
	}
}

// TestForeignTable: somebody else's table of our name, in a namespace that is attached
// to, is left alone, and its family takes netstack.
func TestForeignTable(t *testing.T) {
	need(t, "ip", "nft", "nsenter")
	for _, c := range []struct {
		name, table string
		v4, v6      string
	}{
		{"ip", "table ip slipway { chain c { type filter hook input priority 0; accept; }; }", "netstack", "netstack"},
		{"ip6", "table ip6 slipway { set s { type ipv6_addr; }; }", "kernel", "netstack"},
		{"inet", "table inet slipway { }", "kernel", "kernel"},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newTopology(t)
			guest := newAttachable(t, n)
			if err := guest.NFT(c.table); err != nil {
				t.Fatal(err)
			}
			before := stateOf(t, guest.NS)
			why := ""
			if c.v6 == "netstack" {
				why = "exists already"
			}
			e := guest.attach(t, "--path", "auto")
			expectPaths(t, e, c.v4, c.v6, why)
			guest.detach(t, e)
			before.expect(t, guest.NS)
			if c.v4 == "netstack" {
				r := guest.tryAttach(t, "--path", "kernel")
				expectRefusal(t, r, why)
				before.expect(t, guest.NS)
			}
		})
	}
}

// TestGuestWithoutIPv6: a namespace whose IPv6 is switched off takes the kernel path for
// what it has.
func TestGuestWithoutIPv6(t *testing.T) {
	need(t, "ip", "nft", "nsenter")
	n := newTopology(t)
	guest := newAttachable(t, n)
	for _, name := range []string{"all", "default", "lo"} {
		if err := guest.Sysctl("net.ipv6.conf."+name+".disable_ipv6", "1"); err != nil {
			t.Fatal(err)
		}
	}
	e := guest.attach(t, "--path", "kernel")
	expectPaths(t, e, "kernel", "", "")
	if s, took := dialPromptly(guest.NS, at(topo.World6, 80), time.Second); s == "ok" || s == "silence" || took > time.Second {
		t.Errorf("IPv6: %s after %v", s, took)
	}
	guest.detach(t, e)
}

// TestConntrackFull fills the guest's table of connections. A new connection is then
// dropped by the guest's own kernel, on every path as natively; one that is there goes
// on; and when there is room again new ones work at once.
func TestConntrackFull(t *testing.T) {
	eachGuest(t, func(t *testing.T, g *guest) {
		if g.kind.native { // nothing tracks connections unless a rule asks for it
			if err := g.ns.NFT("table inet track { chain o { type filter hook output priority 0; ct state invalid accept; }; }"); err != nil {
				t.Fatal(err)
			}
		}
		address := echoServer(t, g.net.World, at(families[0].world, 0))
		held := dialEcho(t, g.ns, address)
		var n int
		var s string
		for range 3 { // an entry that was there before may just have ended
			n = fillConntrack(t, g.ns)
			if s = dialError(g.ns, address, 1500*time.Millisecond); s == "silence" {
				break
			}
		}
		if s != "silence" {
			t.Errorf("with %d connections in the table connect says %q", n, s)
		}
		roundTrip(t, held)
		if g.engine != nil {
			if r := g.engine.call(t, "status", g.engine.name); r.code != 0 {
				t.Errorf("status: %s", r.stderr)
			}
		}
		flushConntrack(t, g.ns)
		roundTrip(t, dialEcho(t, g.ns, address))
		if g.engine != nil {
			expectFlow(t, g.engine, families[0], g.kind.path)
		}
	})
}

// TestConntrackFullAtStart: a namespace that cannot make a connection when slipway comes
// gets netstack, with the reason, or is refused.
func TestConntrackFullAtStart(t *testing.T) {
	need(t, "ip", "nft", "nsenter")
	guest := newAttachable(t, newTopology(t))
	before := stateOf(t, guest.NS)
	fillConntrack(t, guest.NS)
	expectRefusal(t, guest.tryAttach(t, "--path", "kernel"), "self-test")
	before.expect(t, guest.NS)
	e := guest.attach(t, "--path", "auto")
	flushConntrack(t, guest.NS)
	expectPaths(t, e, "netstack", "netstack", "self-test")
	guest.detach(t, e)
	before.expect(t, guest.NS)
}

// fillConntrack puts as many connections into a namespace's table as the kernel allows,
// and returns how many. They are marked as answered, so that none gives way to a new one.
// The limit is for each namespace but one number for all, which nobody may change here;
// an entry takes about 320 bytes.
func fillConntrack(t testing.TB, ns *topo.NS) (count int) {
	t.Helper()
	number := func(name string) (n int) {
		text, _ := os.ReadFile("/proc/sys/net/netfilter/" + name)
		fmt.Sscan(string(text), &n)
		return n
	}
	var most int
	err := ns.Do(func() error {
		most = number("nf_conntrack_max")
		if most == 0 || most > 1<<20 {
			return nil
		}
		fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		const batch = 400
		for i := uint32(0); count < most && i < uint32(2*most); {
			var b []byte
			for range batch {
				b = append(b, conntrackEntry(i)...)
				i++
			}
			if err := unix.Sendto(fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
				return fmt.Errorf("entry %d: %w", i, err)
			}
			count = number("nf_conntrack_count")
		}
		return nil
	})
	switch {
	case err != nil:
		t.Fatal(err)
	case most == 0 || most > 1<<20:
		missing(t, "a limit of tracked connections that a test can reach, nf_conntrack_max is %d", most)
	case count < most:
		missing(t, "%d entries in the table of connections, the kernel takes %d", most, count)
	}
	t.Cleanup(func() { flushConntrack(t, ns) })
	return count
}

// conntrackEntry is the netlink message that makes the i-th entry, an answered UDP
// connection.
func conntrackEntry(i uint32) []byte {
	attr := func(typ uint16, parts ...[]byte) []byte {
		data := slices.Concat(parts...)
		b := binary.NativeEndian.AppendUint16(nil, uint16(4+len(data)))
		b = append(binary.NativeEndian.AppendUint16(b, typ), data...)
		return append(b, make([]byte, -len(b)&3)...)
	}
	be16 := func(n uint16) []byte { return binary.BigEndian.AppendUint16(nil, n) }
	be32 := func(n uint32) []byte { return binary.BigEndian.AppendUint32(nil, n) }
	const nested = unix.NLA_F_NESTED
	// linux/netfilter/nfnetlink_conntrack.h
	const (
		tupleOrig, tupleReply, ctStatus, ctTimeout = 1, 2, 3, 7
		tupleIP, tupleProto                        = 1, 2
		v4Src, v4Dst                               = 1, 2
		protoNum, protoSrc, protoDst               = 1, 2, 3
		answered                                   = 2 | 4 | 8 // IPS_SEEN_REPLY, IPS_ASSURED, IPS_CONFIRMED
	)
	a, b := []byte{192, 0, 2, 1}, be32(10<<24|i>>15)
	port := uint16(1024 + i&0x7fff)
	tuple := func(typ uint16, from, to []byte, fromPort, toPort uint16) []byte {
		return attr(nested|typ, attr(nested|tupleIP, attr(v4Src, from), attr(v4Dst, to)),
			attr(nested|tupleProto, attr(protoNum, []byte{unix.IPPROTO_UDP}), attr(protoSrc, be16(fromPort)), attr(protoDst, be16(toPort))))
	}
	body := slices.Concat([]byte{unix.AF_INET, unix.NFNETLINK_V0, 0, 0},
		tuple(tupleOrig, a, b, port, 9), tuple(tupleReply, b, a, 9, port),
		attr(ctStatus, be32(answered)), attr(ctTimeout, be32(600)))
	m := binary.NativeEndian.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+len(body)))
	m = binary.NativeEndian.AppendUint16(m, unix.NFNL_SUBSYS_CTNETLINK<<8) // IPCTNL_MSG_CT_NEW
	m = binary.NativeEndian.AppendUint16(m, unix.NLM_F_REQUEST|unix.NLM_F_CREATE)
	return append(append(m, make([]byte, 8)...), body...)
}

// flushConntrack empties the table, as `conntrack -F` does.
func flushConntrack(t testing.TB, ns *topo.NS) {
	t.Helper()
	err := ns.Do(func() error { return netlink.ConntrackTableFlush(netlink.ConntrackTable) })
	if err != nil {
		t.Error(err)
	}
}

// TestConntrackFlushed: flows outlive `conntrack -F` in the guest, or are reset at once.
func TestConntrackFlushed(t *testing.T) {
	eachGuest(t, func(t *testing.T, g *guest) {
		containers := newContainers(t, g.ns)
		for who, ns := range map[string]*topo.NS{"the namespace itself": g.ns, "a container": containers[0]} {
			if who != "the namespace itself" && g.kind.native {
				continue // its own router knows no way back to a container
			}
			for _, f := range families {
				c := dialEcho(t, ns, echoServer(t, g.net.World, at(f.world, 0)))
				flushConntrack(t, g.ns)
				err := echoOnce(c)
				// What keeps these few in the namespace is a mark of the connection: without
				// it they are cut off, at least at once.
				if ns == g.ns && g.kind.kernel() && errors.Is(err, syscall.ECONNRESET) {
					continue
				}
				if err != nil {
					t.Errorf("%s, %s: %v", who, f.name, err)
				}
			}
		}
	})
}
