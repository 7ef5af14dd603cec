package listeners

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/slipway-net/slipway/internal/flow"
)

// envGuest has the test binary be a guest: it listens where it is told to.
const envGuest = "LISTENERS_TEST_GUEST"

func TestMain(m *testing.M) {
	if os.Getenv(envGuest) != "" {
		if err := guest(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// missing skips a test that cannot run here; NETNS_TESTS=require makes it fail.
func missing(t *testing.T, err error) {
	t.Helper()
	if os.Getenv("NETNS_TESTS") == "require" {
		t.Fatalf("MISSING: network namespaces: %v", err)
	}
	t.Skipf("MISSING: network namespaces: %v", err)
}

// guest is the process inside. It passes a socket for sock_diag(7) out by descriptor 3 and
// obeys: "listen NETWORK ADDRESS", "connect NETWORK ADDRESS", "close NETWORK ADDRESS".
func guest() error {
	lo := &netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Name: "lo", Index: 1}}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	for _, a := range []string{"192.168.65.3/32", "fdc4:f303:9324::3/128"} {
		addr, err := netlink.ParseAddr(a)
		if err != nil {
			return err
		}
		addr.Flags = unix.IFA_F_NODAD
		if err := netlink.AddrAdd(lo, addr); err != nil {
			return err
		}
	}
	diag, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_INET_DIAG)
	if err != nil {
		return err
	}
	if err := unix.Sendmsg(3, []byte("."), unix.UnixRights(diag), nil, 0); err != nil {
		return err
	}
	unix.Close(diag)
	open := make(map[string]io.Closer)
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		verb, what, _ := strings.Cut(in.Text(), " ")
		if err := obey(open, verb, what); err != nil {
			return fmt.Errorf("%s: %w", in.Text(), err)
		}
		fmt.Println("done")
	}
	return nil
}

func obey(open map[string]io.Closer, verb, what string) (err error) {
	network, address, _ := strings.Cut(what, " ")
	switch {
	case verb == "close":
		err = open[what].Close()
		delete(open, what)
	case verb == "connect":
		open[what], err = net.Dial(network, address)
	case strings.HasPrefix(network, "udp"):
		open[what], err = net.ListenPacket(network, address)
	default:
		open[what], err = net.Listen(network, address)
	}
	return err
}

// testGuest is a running guest.
type testGuest struct {
	diag *Diag
	tell func(line string)
}

func startGuest(t *testing.T) *testGuest {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "ours"), os.NewFile(uintptr(pair[1]), "theirs")
	defer ours.Close()
	defer theirs.Close()
	c := exec.Command("/proc/self/exe")
	c.Env = append(os.Environ(), envGuest+"=1")
	c.ExtraFiles = []*os.File{theirs}
	c.Stderr = os.Stderr
	c.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
	}
	stdin, err1 := c.StdinPipe()
	stdout, err2 := c.StdoutPipe()
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		missing(t, err)
	}
	t.Cleanup(func() {
		stdin.Close()
		if err := c.Wait(); err != nil {
			t.Error(err)
		}
	})
	theirs.Close()
	g := &testGuest{diag: NewDiag(receive(t, pair[0]))}
	t.Cleanup(func() { g.diag.Close() })
	out := bufio.NewScanner(stdout)
	g.tell = func(line string) {
		t.Helper()
		if _, err := io.WriteString(stdin, line+"\n"); err != nil || !out.Scan() {
			t.Fatalf("%s: %v", line, err)
		}
	}
	return g
}

// receive returns the socket that a guest passes.
func receive(t *testing.T, fd int) *os.File {
	t.Helper()
	b, oob := make([]byte, 1), make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(fd, b, oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(messages) != 1 {
		t.Fatalf("%d messages, %v", len(messages), err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		t.Fatalf("%v, %v", fds, err)
	}
	return os.NewFile(uintptr(fds[0]), "sock_diag")
}

// sockets reads once.
func (g *testGuest) sockets(t *testing.T) []string {
	t.Helper()
	found := []string{}
	err := g.diag.Read(func(s Socket) {
		only := ""
		if s.Only6 {
			only = " only6"
		}
		found = append(found, fmt.Sprintf("%v %v%s", s.Proto, s.Local, only))
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(found)
	return found
}

// The kernel's answers: what listens, as it is bound, and nothing that is connected.
func TestDiag(t *testing.T) {
	g := startGuest(t)
	if got := g.sockets(t); len(got) > 0 {
		t.Errorf("a new namespace has %q", got)
	}
	for _, line := range []string{
		"listen tcp4 0.0.0.0:80",
		"listen tcp6 [::]:81", // package net has it take IPv6 only
		"listen tcp [::]:82",
		"listen tcp4 127.0.0.1:83",
		"listen tcp4 192.168.65.3:84",
		"listen tcp6 [fdc4:f303:9324::3]:85",
		"listen udp4 0.0.0.0:53",
		"listen udp [::]:54",
		"connect tcp4 192.168.65.3:84",
		"connect udp4 192.168.65.3:53",
	} {
		g.tell(line)
	}
	want := []string{
		"tcp 0.0.0.0:80", "tcp 127.0.0.1:83", "tcp 192.168.65.3:84", "tcp [::]:81 only6", "tcp [::]:82",
		"tcp [fdc4:f303:9324::3]:85 only6", "udp 0.0.0.0:53", "udp [::]:54",
	}
	if diff := cmp.Diff(want, g.sockets(t)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	g.tell("close tcp4 0.0.0.0:80")
	if got := g.sockets(t); slices.Contains(got, "tcp 0.0.0.0:80") {
		t.Errorf("after close: %q", got)
	}
}

// A socket keeps its cookie, and the next at the same port has another.
func TestDiagCookie(t *testing.T) {
	g := startGuest(t)
	cookie := func(network string) (c uint64) {
		t.Helper()
		g.tell("listen " + network + " 0.0.0.0:80")
		for range 2 {
			before := c
			if err := g.diag.Read(func(s Socket) { c = s.Cookie }); err != nil {
				t.Fatal(err)
			}
			if c == 0 || before != 0 && c != before {
				t.Errorf("%s: cookie %d, was %d", network, c, before)
			}
		}
		g.tell("close " + network + " 0.0.0.0:80")
		return c
	}
	seen := make(map[uint64]bool)
	for _, network := range []string{"tcp4", "tcp4", "udp4", "udp4"} {
		c := cookie(network)
		if seen[c] {
			t.Errorf("%s: cookie %d again", network, c)
		}
		seen[c] = true
	}
}

// More than one part of an answer.
func TestDiagManySockets(t *testing.T) {
	g := startGuest(t)
	const n = 2000
	for i := range n {
		g.tell(fmt.Sprintf("listen tcp4 0.0.0.0:%d", 10000+i))
	}
	for range 3 {
		if got := g.sockets(t); len(got) != n {
			t.Errorf("%d sockets, want %d", len(got), n)
		}
	}
}

// From a program that listens to the port on the host, and back.
func TestWatchGuest(t *testing.T) {
	g := startGuest(t)
	ctx, cancel := context.WithCancel(t.Context())
	var mu sync.Mutex
	var published []string
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	running.Go(func() {
		Watch(ctx, Config{
			Read:   g.diag.Read,
			Guest4: netip.MustParseAddr("192.168.65.3"), Guest6: netip.MustParseAddr("fdc4:f303:9324::3"),
			LocalPorts: [2]uint16{32768, 60999},
			Log:        slog.New(slog.DiscardHandler),
			Apply: func(specs []flow.PortSpec) []error {
				mu.Lock()
				defer mu.Unlock()
				published = nil
				for _, s := range specs {
					published = append(published, s.String())
				}
				return nil
			},
		})
	})
	wait := func(want ...string) {
		t.Helper()
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for deadline := time.Now().Add(10 * time.Second); ; <-tick.C {
			mu.Lock()
			got := slices.Clone(published)
			mu.Unlock()
			if slices.Equal(got, want) {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("published %q, want %q", got, want)
			}
		}
	}
	g.tell("listen tcp [::]:3000")
	g.tell("listen tcp 127.0.0.1:3001")
	wait("3000:3000/tcp")
	g.tell("listen udp4 0.0.0.0:53")
	wait("0.0.0.0:53:53/udp", "3000:3000/tcp")
	g.tell("close tcp [::]:3000")
	wait("0.0.0.0:53:53/udp")
	cancel()
	wait()
}

// An error of the kernel is one, and the next question is answered.
func TestDiagErrors(t *testing.T) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_INET_DIAG)
	if err != nil {
		t.Fatal(err)
	}
	d := NewDiag(os.NewFile(uintptr(fd), "sock_diag"))
	if err := d.dump(flow.TCP, 0xff, 1<<stateListen, nil); err == nil {
		t.Error("a family that nobody has: no error")
	}
	if err := d.Read(func(Socket) {}); err != nil {
		t.Errorf("after an error: %v", err)
	}
	d.Close()
	if err := d.Read(func(Socket) {}); err == nil {
		t.Error("after Close: no error")
	}
}

// What a process of the namespace sends is no answer, even if it looks like the end of one.
func TestDiagHearsTheKernelOnly(t *testing.T) {
	open := func() int {
		fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_INET_DIAG)
		if err != nil {
			t.Fatal(err)
		}
		return fd
	}
	ours, theirs := open(), open()
	d := NewDiag(os.NewFile(uintptr(ours), "sock_diag"))
	defer d.Close()
	defer unix.Close(theirs)
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	finds := func() (ok bool) {
		if err := d.Read(func(s Socket) { ok = ok || s.Local == ln.Addr().(*net.TCPAddr).AddrPort() }); err != nil {
			t.Fatal(err)
		}
		return ok
	}
	if !finds() {
		t.Fatal("the listener is not found")
	}
	own, err := unix.Getsockname(ours)
	if err != nil {
		t.Fatal(err)
	}
	end := binary.NativeEndian.AppendUint32(nil, unix.SizeofNlMsghdr)
	end = binary.NativeEndian.AppendUint16(end, unix.NLMSG_DONE)
	end = binary.NativeEndian.AppendUint16(end, 0)
	end = binary.NativeEndian.AppendUint32(end, d.seq+1)
	end = binary.NativeEndian.AppendUint32(end, 0)
	for _, forged := range [][]byte{end, []byte("nonsense")} {
		if err := unix.Sendto(theirs, forged, 0, own); err != nil {
			missing(t, err)
		}
	}
	if !finds() {
		t.Error("a forged end of an answer is believed")
	}
}

func TestResult(t *testing.T) {
	enoent := binary.NativeEndian.AppendUint32(nil, ^uint32(unix.ENOENT)+1)
	for _, c := range []struct {
		data []byte
		want error
	}{{nil, nil}, {[]byte{1, 2}, nil}, {make([]byte, 4), nil}, {enoent, unix.ENOENT}} {
		if err := result(c.data); err != c.want {
			t.Errorf("% x: %v", c.data, err)
		}
	}
}

// answer is a valid one.
func answer(family byte, address string, attrs ...byte) []byte {
	a := netip.MustParseAddrPort(address)
	b := make([]byte, answerLen)
	b[0] = family
	binary.BigEndian.PutUint16(b[socketAt:], a.Port())
	copy(b[addressAt:], a.Addr().AsSlice())
	return append(b, attrs...)
}

func TestParse(t *testing.T) {
	attr := func(typ uint16, size uint16, data ...byte) []byte {
		return append(binary.NativeEndian.AppendUint16(binary.NativeEndian.AppendUint16(nil, size), typ), data...)
	}
	only := attr(attrOnly6, 5, 1, 0, 0, 0)
	for _, c := range []struct {
		name string
		b    []byte
		want string
	}{
		{"ipv4", answer(unix.AF_INET, "192.0.2.1:80"), "192.0.2.1:80 false"},
		{"ipv6", answer(unix.AF_INET6, "[2001:db8::1]:443"), "[2001:db8::1]:443 false"},
		{"only6", answer(unix.AF_INET6, "[::]:443", only...), "[::]:443 true"},
		{"both", answer(unix.AF_INET6, "[::]:443", attr(attrOnly6, 5, 0, 0, 0, 0)...), "[::]:443 false"},
		{"behind_another", answer(unix.AF_INET6, "[::]:443", append(attr(8, 5, 9, 0, 0, 0), only...)...), "[::]:443 true"},
		{"empty_attribute", answer(unix.AF_INET6, "[::]:443", attr(attrOnly6, 4)...), "[::]:443 false"},
		{"attribute_without_end", answer(unix.AF_INET6, "[::]:443", attr(8, 4000, 1)...), "[::]:443 false"},
		{"attribute_of_no_length", answer(unix.AF_INET6, "[::]:443", append(attr(8, 0), only...)...), "[::]:443 false"},
		{"attribute_of_ipv4", answer(unix.AF_INET, "0.0.0.0:443", only...), "0.0.0.0:443 false"},
		{"not_bound", answer(unix.AF_INET, "0.0.0.0:0"), ""},
		{"other_family", answer(unix.AF_UNIX, "0.0.0.0:80"), ""},
		{"short", answer(unix.AF_INET, "0.0.0.0:80")[:answerLen-1], ""},
		{"empty", nil, ""},
	} {
		got := ""
		if s, ok := parse(c.b, flow.TCP); ok {
			got = fmt.Sprintf("%v %v", s.Local, s.Only6)
		}
		if got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(answer(unix.AF_INET, "192.0.2.1:80"))
	f.Add(answer(unix.AF_INET6, "[2001:db8::1]:443", 5, 0, attrOnly6, 0, 1, 0, 0, 0))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, ok := parse(b, flow.UDP)
		if ok && (!s.Local.IsValid() || s.Local.Port() == 0 || s.Only6 && s.Local.Addr().Is4()) {
			t.Errorf("%+v", s)
		}
	})
}
