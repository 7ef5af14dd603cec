package publish

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/slipway-net/slipway/internal/flow"
)

// missing skips a test that cannot run here, loudly; with NETNS_TESTS=require it fails.
func missing(t *testing.T, err error) {
	t.Helper()
	if os.Getenv("NETNS_TESTS") == "require" {
		t.Fatalf("cannot test this here: %v", err)
	}
	t.Skipf("cannot test this here: %v", err)
}

// The roles of a child of this binary.
const (
	roleListen  = "listen"  // on TCP and UDP, until its stdin ends
	roleLow     = "low"     // publish port 81 without rights
	roleNoIPv6  = "noipv6"  // publish where there is no IPv6
	roleNoFiles = "nofiles" // publish with few descriptors
)

// helper is what a child does in place of the tests. It says what happened on stdout.
func helper(role string) {
	switch role {
	case roleListen:
		listenForParent()
	case roleLow:
		publishLow()
	case roleNoIPv6:
		publishWithoutIPv6()
	case roleNoFiles:
		publishWithoutFiles()
	}
	os.Exit(0)
}

// child prepares one.
func child(t *testing.T, role string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), helperRole+"="+role)
	cmd.Stderr = t.Output()
	return cmd
}

// lines runs a child to its end.
func lines(t *testing.T, cmd *exec.Cmd) []string {
	t.Helper()
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v, after %q", err, out)
	}
	return strings.Split(strings.TrimSpace(string(out)), "\n")
}

func die(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "helper:", err)
		os.Exit(1)
	}
}

// openFDs counts the descriptors of this process.
func openFDs(t *testing.T) int {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(fds)
}

func TestNoDescriptorIsLeft(t *testing.T) {
	b, c := newBook(t, Config{})
	b.Remove(add(t, b, "me", spec(t, "0:80")).ID) // now the runtime has its own
	taken, err := net.Listen("tcp6", "[::1]:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	before := openFDs(t)
	fails := errors.New("no room")
	for i := range 50 {
		add(t, b, "me", spec(t, fmt.Sprintf("0:%d", i+1)))
		add(t, b, "me", spec(t, fmt.Sprintf("0:%d/udp", i+1)))
		if _, err := b.Add("me", at(spec(t, "1:80"), taken.Addr().(*net.TCPAddr).AddrPort().Port())); err == nil {
			t.Fatal("a port that is taken was published")
		}
		c.fail = func(*Port) error { return fails }
		if _, err := b.Add("you", spec(t, "0:80")); err == nil {
			t.Fatal("a port was published that cannot be carried")
		}
		c.fail = nil
	}
	b.RemoveOwner("me")
	await(t, fmt.Sprintf("return to %d descriptors", before), func() bool { return openFDs(t) <= before })
}

// What the datapath and the documents rely on.
func TestSocketOptions(t *testing.T) {
	b, _ := newBook(t, Config{})
	options := []struct {
		name       string
		level, opt int
		tcp, udp   int
	}{
		{"SO_PROTOCOL", unix.SOL_SOCKET, unix.SO_PROTOCOL, unix.IPPROTO_TCP, unix.IPPROTO_UDP}, // no MPTCP
		{"SO_REUSEADDR", unix.SOL_SOCKET, unix.SO_REUSEADDR, 1, 0},
		{"SO_REUSEPORT", unix.SOL_SOCKET, unix.SO_REUSEPORT, 0, 0},
		{"IPV6_V6ONLY", unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1, 1},
	}
	for _, s := range []string{"0:80", "0:80/udp"} {
		add(t, b, "me", spec(t, s))
		for _, sock := range b.find("me", spec(t, s)).sockets {
			var conn syscall.Conn = sock.udp
			if sock.ln != nil {
				conn = sock.ln
			}
			raw, err := conn.SyscallConn()
			if err != nil {
				t.Fatal(err)
			}
			for _, o := range options {
				if o.level == unix.IPPROTO_IPV6 && sock.at.Addr().Is4() {
					continue
				}
				want := o.tcp
				if sock.udp != nil {
					want = o.udp
				}
				raw.Control(func(fd uintptr) {
					if got, err := unix.GetsockoptInt(int(fd), o.level, o.opt); err != nil || got != want {
						t.Errorf("%s on %v: %s = %d, %v; want %d", s, sock.at, o.name, got, err, want)
					}
				})
			}
		}
	}
}

// A port below the first unprivileged one, as nobody, in a network namespace of its
// own if possible: containers often have 0 there.
func TestPrivilegedPort(t *testing.T) {
	cmd := child(t, roleLow)
	if os.Geteuid() == 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	} else if first := unprivilegedPorts(); first <= 81 {
		missing(t, fmt.Errorf("everybody may listen on ports from %d", first))
	}
	for i, text := range lines(t, cmd) {
		want := []string{
			"*publish.PolicyError",
			"publish 0.0.0.0:81/tcp: ports below 1024 need root or CAP_NET_BIND_SERVICE",
			"sudo sysctl net.ipv4.ip_unprivileged_port_start=81, or sudo setcap cap_net_bind_service=+ep " + cmd.Path,
		}[i]
		if text != want {
			t.Errorf("line %d: %q\n want %q", i, text, want)
		}
	}
}

func publishLow() {
	if os.Geteuid() == 0 {
		die(syscall.Setuid(65534))
	}
	b := New(Config{Carrier: new(teller)})
	_, err := b.Add("me", flow.PortSpec{Proto: flow.TCP, Host: netip.MustParseAddrPort("0.0.0.0:81")})
	fmt.Printf("%T\n%v\n%s\n", err, err, hint(err))
}

// A kernel without IPv6: socket(AF_INET6) fails.
func TestNoIPv6(t *testing.T) {
	cmd := child(t, roleNoIPv6)
	got := strings.Join(lines(t, cmd), "\n")
	if err, skip := strings.CutPrefix(got, "missing: "); skip {
		missing(t, errors.New(err))
	}
	const want = `0:80: [0.0.0.0] [true] <nil>
[::]:0:80: publish [::]:0/tcp: this host does not do that address family
[::]:HIGH:80: [] [] <nil>
[::1]:HIGH:80: publish [::1]:HIGH/tcp: this host does not do that address family
0:80: [127.0.0.1] [true] <nil>
[::]:0:80: publish [::1]:0/tcp: this host does not do that address family
[::]:HIGH:80: [] [] <nil>
[::1]:HIGH:80: publish [::1]:HIGH/tcp: this host does not do that address family`
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func publishWithoutIPv6() {
	if err := refuseIPv6(); err != nil {
		fmt.Println("missing:", err)
		return
	}
	for _, bind := range []string{BindAsAsked, BindLoopbackDefault} {
		b := New(Config{Carrier: new(teller), Bind: bind})
		const high = "61080"
		for _, s := range []string{"0:80", "[::]:0:80", "[::]:HIGH:80", "[::1]:HIGH:80"} {
			specs, err := flow.ParsePorts(strings.Replace(s, "HIGH", high, 1))
			die(err)
			p, err := b.Add("me", specs[0])
			if err != nil {
				fmt.Printf("%s: %s\n", s, strings.Replace(err.Error(), high, "HIGH", 1))
				continue
			}
			var real []bool
			for _, l := range p.Listens {
				real = append(real, l.Port() != 0 && l.Port() == p.Spec.Host.Port())
			}
			fmt.Println(s+":", addrs(p), real, b.RemoveSpec("me", p.Spec))
		}
		b.Close()
	}
}

// refuseIPv6 has the kernel answer EAFNOSUPPORT to socket(AF_INET6) from now on.
func refuseIPv6() error {
	load := func(offset uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offset}
	}
	unless := func(k uint32, skip uint8) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: k, Jf: skip}
	}
	const number, firstArgument = 0, 16 // in struct seccomp_data; the low word of a little-endian machine
	filter := []unix.SockFilter{
		load(number), unless(unix.SYS_SOCKET, 3),
		load(firstArgument), unless(unix.AF_INET6, 1),
		{Code: unix.BPF_RET | unix.BPF_K, K: 0x50000 | uint32(unix.EAFNOSUPPORT)}, // SECCOMP_RET_ERRNO
		{Code: unix.BPF_RET | unix.BPF_K, K: 0x7fff0000},                          // SECCOMP_RET_ALLOW
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl", err)
	}
	const setFilter, allThreads = 1, 1
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, setFilter, allThreads, uintptr(unsafe.Pointer(&prog))); errno != 0 {
		return os.NewSyscallError("seccomp", errno)
	}
	return nil
}

func TestLacksFamily(t *testing.T) {
	tests := []struct {
		at   netip.Addr
		err  error
		want bool
	}{
		{any6, unix.EAFNOSUPPORT, true},
		{loop6, unix.EAFNOSUPPORT, true},
		{loop6, unix.EADDRNOTAVAIL, true}, // disable_ipv6 on lo
		{any6, unix.EADDRNOTAVAIL, false},
		{any6, unix.EADDRINUSE, false},
	}
	for _, tt := range tests {
		if got := lacksFamily(tt.at, &listenError{netip.AddrPortFrom(tt.at, 80), tt.err}); got != tt.want {
			t.Errorf("lacksFamily(%v, %v) = %v", tt.at, tt.err, got)
		}
	}
}

// When the descriptors are used up a publish says so, and the ports there are go on.
func TestNoFiles(t *testing.T) {
	got := lines(t, child(t, roleNoFiles))
	want := []string{
		"true: publish 0.0.0.0:0/tcp: too many published ports: too many open files",
		hintFiles,
		"true: publish 0.0.0.0:0/tcp: too many published ports: 5 sockets are a quarter of the limit of descriptors",
		hintFiles,
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func publishWithoutFiles() {
	s := flow.PortSpec{Proto: flow.TCP, Host: netip.AddrPortFrom(any4, 0)} // one socket
	say := func(b *Book) {
		for i := range 100 {
			s.Guest = netip.AddrPortFrom(netip.Addr{}, uint16(i+1))
			if _, err := b.Add("me", s); err != nil {
				fmt.Printf("%v: %v\n%s\n", errors.Is(err, ErrTooMany), err, hint(err))
				return
			}
		}
	}
	b := New(Config{Carrier: new(teller)})
	var l unix.Rlimit
	die(unix.Getrlimit(unix.RLIMIT_NOFILE, &l))
	_, err := b.Add("me", s) // the runtime opens what it needs
	die(err)
	l.Cur = 20
	die(syscall.Setrlimit(syscall.RLIMIT_NOFILE, (*syscall.Rlimit)(&l)))
	say(b)
	b.Close()
	say(New(Config{Carrier: new(teller)}))
}
