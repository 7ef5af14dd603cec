package publish

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/slipway-net/slipway/internal/flow"
)

// Another process has the port, and the error says which.
func TestConflictWithProcess(t *testing.T) {
	cmd := child(t, roleListen)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer stdin.Close()
	said := bufio.NewScanner(stdout)
	b, _ := newBook(t, Config{})
	b.holders.budget = patience // the child comes last in /proc
	for said.Scan() && said.Text() != "" {
		ask, where, _ := strings.Cut(said.Text(), " ")
		where, how, _ := strings.Cut(where, " ")
		_, err := b.Add("me", spec(t, ask))
		at := netip.MustParseAddrPort(where)
		proto := spec(t, ask).Proto
		want := fmt.Sprintf("publish %v/%v: port %d is taken by %s%s (pid %d)", at, proto, at.Port(), how, comm(t, cmd.Process.Pid), cmd.Process.Pid)
		var conflict *ConflictError
		if !errors.As(err, &conflict) || err.Error() != want || hint(err) == "" {
			t.Errorf("%s: %v\n want %s", ask, err, want)
		}
	}
	if err := said.Err(); err != nil {
		t.Error(err)
	}
}

func comm(t *testing.T, pid int) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

// listenForParent listens in several ways and says what cannot be published then,
// which address the error will be about, and how the port is used.
func listenForParent() {
	tcp, err := net.Listen("tcp4", "127.0.0.1:0")
	die(err)
	dual, err := net.Listen("tcp", ":0")
	die(err)
	udp, err := net.ListenPacket("udp6", "[::1]:0")
	die(err)
	conn, err := net.Dial("tcp4", tcp.Addr().String()) // a connection has a port, too
	die(err)
	for _, say := range []struct {
		at    net.Addr
		lines string
	}{
		{tcp.Addr(), "127.0.0.1:PORT:80 127.0.0.1:PORT\nPORT:80 0.0.0.0:PORT"},
		{dual.Addr(), "[::1]:PORT:80 [::1]:PORT\n127.0.0.1:PORT:80 127.0.0.1:PORT"},
		{udp.LocalAddr(), "PORT:53/udp [::]:PORT"},
		{conn.LocalAddr(), "0.0.0.0:PORT:80 0.0.0.0:PORT a connection of "},
	} {
		_, port, err := net.SplitHostPort(say.at.String())
		die(err)
		fmt.Println(strings.ReplaceAll(say.lines, "PORT", port))
	}
	fmt.Println()
	io.Copy(io.Discard, os.Stdin)
}

// fakeProc is a /proc to be filled in.
type fakeProc struct {
	t    *testing.T
	root string
}

func (p fakeProc) write(text string, elem ...string) {
	p.t.Helper()
	name := filepath.Join(append([]string{p.root}, elem...)...)
	if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		p.t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		p.t.Fatal(err)
	}
}

func (p fakeProc) process(pid int, comm string, inodes ...uint64) {
	p.t.Helper()
	p.write(comm+"\n", strconv.Itoa(pid), "comm")
	for fd, inode := range inodes {
		name := filepath.Join(p.root, strconv.Itoa(pid), "fd", strconv.Itoa(fd))
		if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
			p.t.Fatal(err)
		}
		os.Remove(name)
		if err := os.Symlink(socketLink(inode), name); err != nil {
			p.t.Fatal(err)
		}
	}
}

// row formats a line of /proc/net/tcp.
func row(r socketRow, state string) string {
	var b strings.Builder
	a := r.local.Addr().AsSlice()
	for len(a) > 0 {
		fmt.Fprintf(&b, "%02X%02X%02X%02X", a[3], a[2], a[1], a[0]) // of a little-endian machine
		a = a[4:]
	}
	return fmt.Sprintf("   0: %s:%04X 00000000:0000 %s 00000000:00000000 00:00000000 00000000 %5d        0 %d 1 0000000000000000 100 0 0 10 0\n",
		b.String(), r.local.Port(), state, r.uid, r.inode)
}

// found is what h finds in words, "" for nobody.
func found(h *holders, proto flow.Proto, at string) string {
	who := h.find(proto, netip.MustParseAddrPort(at))
	if who == nil {
		return ""
	}
	return who.String()
}

func TestHolder(t *testing.T) {
	p := fakeProc{t, t.TempDir()}
	listener := func(addr string, uid uint32, inode uint64) string {
		return row(socketRow{local: netip.MustParseAddrPort(addr), uid: uid, inode: inode}, tcpListen)
	}
	const header = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
	p.write(header+
		row(socketRow{local: netip.MustParseAddrPort("10.0.0.1:80"), inode: 1}, "01")+ // a connection to the listener
		listener("0.0.0.0:80", 0, 2)+
		listener("127.0.0.1:81", 0, 3)+
		listener("127.0.0.1:82", 33, 4)+
		row(socketRow{local: netip.MustParseAddrPort("127.0.0.1:83")}, "06")+ // TIME_WAIT: nobody's
		listener("127.0.0.1:84", 0, 5)+
		listener("127.0.0.1:85", 0, 6)+
		row(socketRow{local: netip.MustParseAddrPort("10.0.0.1:40000"), uid: 33, inode: 10}, "01")+
		"garbage\n", "thread-self", "net", "tcp")
	p.write(header+listener("[::]:86", 0, 7)+listener("[::1]:87", 0, 8), "thread-self", "net", "tcp6")
	p.write(header+row(socketRow{local: netip.MustParseAddrPort("0.0.0.0:80"), inode: 9}, udpUnconn), "thread-self", "net", "udp")
	p.process(812, "nginx", 1, 2)
	p.process(1000, "nginx-worker", 2)
	p.process(9, "evil\x1b[2J\nname", 5)
	p.process(13, "dual", 7, 8)
	p.process(14, "named", 9)
	p.write("", "self", "comm")

	h := &holders{proc: p.root, budget: patience}
	tests := []struct {
		proto flow.Proto
		at    string
		want  string
	}{
		{flow.TCP, "0.0.0.0:80", "nginx (pid 812)"},
		{flow.TCP, "10.0.0.1:80", "nginx (pid 812)"},
		{flow.TCP, "[::]:80", ""}, // no conflict of ours: IPV6_V6ONLY
		{flow.TCP, "0.0.0.0:81", "a process of root"},
		{flow.TCP, "127.0.0.1:82", "a process of uid 33"},
		{flow.TCP, "127.0.0.2:82", ""},
		{flow.TCP, "127.0.0.1:83", ""},
		{flow.TCP, "127.0.0.1:84", "evil?[2J?name (pid 9)"},
		{flow.TCP, "127.0.0.1:86", "dual (pid 13)"},
		{flow.TCP, "[::1]:86", "dual (pid 13)"},
		{flow.TCP, "0.0.0.0:40000", "a connection of a process of uid 33"},
		{flow.TCP, "127.0.0.1:87", ""},
		{flow.UDP, "127.0.0.1:80", "named (pid 14)"},
		{flow.UDP, "127.0.0.1:81", ""},
	}
	for _, tt := range tests {
		if got := found(h, tt.proto, tt.at); got != tt.want {
			t.Errorf("find(%v, %s) = %q, want %q", tt.proto, tt.at, got, tt.want)
		}
	}

	// What was seen is good for a second, unless it is not so any more, or something is new.
	h.last.at, h.last.took = time.Now(), holdersAge
	seen := h.last
	p.process(15, "late", 6)
	if got := found(h, flow.TCP, "127.0.0.1:85"); got != "a process of root" || h.last != seen {
		t.Errorf("find = %q, scanned again: %v", got, h.last != seen)
	}
	h.last.took = 0
	p.process(9, "gone", 4711)
	if got := found(h, flow.TCP, "127.0.0.1:84"); got != "a process of root" || h.last == seen {
		t.Errorf("find = %q after the process has closed it, scanned again: %v", got, h.last != seen)
	}
	h.last.at = time.Now().Add(-holdersAge - time.Millisecond)
	p.process(9, "back", 5)
	if got := found(h, flow.TCP, "127.0.0.1:84"); got != "back (pid 9)" {
		t.Errorf("find = %q after a second", got)
	}

	// Without time to look through processes there is still the user.
	h.last = h.scan(0)
	if got := found(h, flow.TCP, "0.0.0.0:80"); got != "a process of root" {
		t.Errorf("find = %q without time", got)
	}
	if got := found(&holders{proc: filepath.Join(p.root, "nothing")}, flow.TCP, "0.0.0.0:80"); got != "" {
		t.Errorf("find = %q without /proc", got)
	}
}

// Many conflicts cost one scan, not one each.
func TestConflictsAreQuick(t *testing.T) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	b, _ := newBook(t, Config{})
	b.holders.budget = patience
	s := at(spec(t, "127.0.0.1:1:80"), ln.Addr().(*net.TCPAddr).AddrPort().Port())
	scans := make(map[*holderScan]bool)
	from := time.Now()
	for range 1000 {
		if _, err := b.Add("me", s); err == nil || !strings.HasSuffix(err.Error(), fmt.Sprintf("(pid %d)", os.Getpid())) {
			t.Fatalf("error %v, want our own pid", err)
		}
		scans[b.holders.last] = true
	}
	if d := time.Since(from); len(scans) > 1+int(d/holdersAge) {
		t.Errorf("%d scans in %v", len(scans), d)
	}
}

func FuzzSocketRow(f *testing.F) {
	f.Add(row(socketRow{local: netip.MustParseAddrPort("127.0.0.1:8080"), uid: 1000, inode: 31337}, tcpListen), true)
	f.Add(row(socketRow{local: netip.MustParseAddrPort("[2001:db8::1]:53"), inode: 1}, udpUnconn), false)
	f.Add("  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode", true)
	f.Add("0: 00000000000000000000FFFF0100007F:1F90 0 01 0 0 0 0 0 0", true)
	f.Fuzz(func(t *testing.T, line string, tcp bool) {
		proto, listening := flow.UDP, udpUnconn
		if tcp {
			proto, listening = flow.TCP, tcpListen
		}
		r, ok := parseSocketRow(line, proto)
		if !ok {
			return
		}
		if a := r.local.Addr(); !a.IsValid() || a.Is4In6() || a.Zone() != "" {
			t.Fatalf("parseSocketRow(%q) = %+v", line, r)
		}
		state := "01"
		if r.listen {
			state = listening
		}
		if again, ok := parseSocketRow(row(r, state), proto); !ok || again != r {
			t.Fatalf("%+v is %+v, %v after it was written", r, again, ok)
		}
	})
}
