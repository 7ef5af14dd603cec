package api

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/slipway-net/slipway/internal/flow"
)

// guests is a GuestBackend whose engine has our own network namespace, or that of a
// path.
type guests struct {
	book
	netns string
}

func (g *guests) NetNS() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.netns == "" {
		return "/proc/self/ns/net"
	}
	return g.netns
}

func serveGuests(t *testing.T, b GuestBackend) string {
	t.Helper()
	return listen(t, NewGuestServer(b, nil).Serve)
}

func dialGuest(t *testing.T, path string) *GuestConn {
	t.Helper()
	c, err := DialGuest(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestGuest(t *testing.T) {
	b := new(guests)
	path := serveGuests(t, b)
	c, other := dialGuest(t, path), dialGuest(t, path)
	p, err := c.Publish(spec(t, "8080:80"))
	if err != nil || p.Spec.ParentPort != 8080 || !regexp.MustCompile(fmt.Sprintf(`^guest:%d/[12]$`, os.Getpid())).MatchString(p.Owner) {
		t.Fatalf("Publish = %+v, %v", p, err)
	}
	if again, err := c.Publish(spec(t, "8080:80")); err != nil || again.ID != p.ID {
		t.Errorf("the same again = %+v, %v", again, err)
	}
	if _, err := other.Publish(spec(t, "8080:80")); asError(err).Status != http.StatusConflict || !strings.Contains(err.Error(), "taken by guest:") {
		t.Errorf("another's = %v", err)
	}
	if err := other.Withdraw(p.ID); asError(err).Status != http.StatusNotFound {
		t.Errorf("another's withdrawn: %v", err)
	}
	if err := c.Withdraw(p.ID); err != nil || len(b.Ports(t.Context())) != 0 {
		t.Errorf("Withdraw = %v, left %v", err, b.Ports(t.Context()))
	}
	if err := c.Withdraw(p.ID); asError(err).Status != http.StatusNotFound {
		t.Errorf("Withdraw again = %v", err)
	}
	if _, err := other.Publish(spec(t, "8080:80")); err != nil {
		t.Errorf("Publish of what was withdrawn = %v", err)
	}
}

func TestGuestErrors(t *testing.T) {
	b := new(guests)
	c := dialGuest(t, serveGuests(t, b))
	want := &Error{Message: "publish 0.0.0.0:80/tcp: permission denied", Hint: "sysctl", Status: 400}
	b.breaks(want)
	var e *Error
	if _, err := c.Publish(spec(t, "80:80")); !errors.As(err, &e) || *e != *want {
		t.Errorf("Publish = %+v, want %+v", err, want)
	}
	b.breaks(errors.New("broken"))
	if _, err := c.Publish(spec(t, "80:80")); !errors.As(err, &e) || e.Message != "broken" || e.Status != 0 {
		t.Errorf("Publish = %+v", err)
	}
	if _, err := c.Publish(flow.PortSpec{Proto: flow.Ping}); err == nil || !strings.Contains(err.Error(), `proto "ping"`) {
		t.Errorf("Publish of no port = %v", err)
	}
}

// The ports are free when Close returns: who comes next gets them.
func TestGuestCloses(t *testing.T) {
	b := new(guests)
	path := serveGuests(t, b)
	for range 50 {
		c := dialGuest(t, path)
		for _, s := range []string{"80:80", "53:53/udp"} {
			if _, err := c.Publish(spec(t, s)); err != nil {
				t.Fatal(err)
			}
		}
		if err := c.Close(); err != nil || len(b.Ports(t.Context())) != 0 {
			t.Fatalf("Close = %v, left %v", err, b.Ports(t.Context()))
		}
		select {
		case <-c.Done():
		default:
			t.Fatal("closed, but not done")
		}
	}
}

// slowBook takes its time to remove: the daemon is busy.
type slowBook struct {
	guests
	delay time.Duration
}

func (s *slowBook) RemovePort(id uint64) error {
	time.Sleep(s.delay)
	return s.guests.RemovePort(id)
}

// A client that was killed has no claim any more, even if its lease has not ended yet.
func TestGuestIsKilled(t *testing.T) {
	for delay, times := range map[time.Duration]int{20 * time.Millisecond: 5, 2 * time.Second: 1} {
		path := serveGuests(t, &slowBook{delay: delay})
		for range times {
			c := dialGuest(t, path)
			if _, err := c.Publish(spec(t, "80:80")); err != nil {
				t.Fatal(err)
			}
			next := dialGuest(t, path)
			c.conn.Close()
			if _, err := next.Publish(spec(t, "80:80")); err != nil {
				t.Errorf("the port of one who has gone, after %v: %v", delay, err)
			}
			next.Close()
		}
	}
}

func TestGuestServerEnds(t *testing.T) {
	b := new(guests)
	var c *GuestConn
	t.Run("served", func(t *testing.T) {
		var err error
		if c, err = DialGuest(serveGuests(t, b)); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Publish(spec(t, "80:80")); err != nil {
			t.Fatal(err)
		}
	})
	<-c.Done()
	if l := b.Ports(t.Context()); len(l) != 0 {
		t.Errorf("left %v", l)
	}
	var e *Error
	if _, err := c.Publish(spec(t, "80:80")); err == nil || errors.As(err, &e) {
		t.Errorf("Publish after the end = %v", err)
	}
	if err := c.Close(); err != nil {
		t.Errorf("Close after the end = %v", err)
	}
}

// talk sends text and returns the answer's lines until the connection ends, which it
// does by itself, or since we have said all.
func talk(t *testing.T, path, text string) []string {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	io.WriteString(c, text) // an error is that it has ended
	c.(*net.UnixConn).CloseWrite()
	var lines []string
	in := bufio.NewScanner(c)
	for in.Scan() {
		lines = append(lines, in.Text())
	}
	if err := in.Err(); err != nil && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read: %v", err)
	}
	return lines
}

func TestGuestLines(t *testing.T) {
	b := new(guests)
	path := serveGuests(t, b)
	const publish = `{"publish":{"proto":"tcp","parentPort":80}}`
	tests := []struct {
		name, text string
		want       []string // how the lines begin
	}{
		{"nothing", "", nil},
		{"several in one write", publish + "\n" + `{"withdraw":999}` + "\nhello\n\n" + publish + "\n",
			[]string{`{"port":{"id":`, `{"error":"withdraw port 999: it is none of this connection","status":404}`, `{"error":"read request: invalid`, `{"error":"read request: unexpected end`, `{"port":{"id":`}},
		{"no end of line", publish, nil},
		{"longest line", publish + strings.Repeat(" ", maxLine-len(publish)-1) + "\n", []string{`{"port":`}},
		{"too long", publish + "\n" + strings.Repeat("x", maxLine) + "\n" + publish + "\n", []string{`{"port":`, `{"error":"read request: longer than 4096 bytes","status":400}`}},
		{"long and short", publish + strings.Repeat(" ", shortLine) + "\n" + publish + "\n" + publish + strings.Repeat(" ", 2*shortLine) + "\n" + publish + "\n",
			[]string{`{"port":`, `{"port":`, `{"port":`, `{"port":`}},
		{"endless", strings.Repeat("x", 1<<20), []string{`{"error":"read request: longer`}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := talk(t, path, tt.text)
			if len(got) != len(tt.want) {
				t.Fatalf("answers %q, want %q", got, tt.want)
			}
			for i := range got {
				if !strings.HasPrefix(got[i], tt.want[i]) {
					t.Errorf("answer %q, want %q", got[i], tt.want[i])
				}
			}
			if l := b.Ports(t.Context()); len(l) != 0 {
				t.Errorf("left %v", l)
			}
		})
	}
}

// Who asks and asks and does not read is cut off, and has nothing after that.
func TestGuestStopsReading(t *testing.T) {
	b := new(guests)
	s := NewGuestServer(b, nil)
	s.patience = time.Second // ours is answered within it on a busy machine, too
	path := listen(t, s.Serve)
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	for err == nil {
		_, err = io.WriteString(c, `{"publish":{"proto":"tcp","parentPort":80}}`+"\n")
	}
	if !errors.Is(err, syscall.EPIPE) && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("write = %v", err)
	}
	if _, err := dialGuest(t, path).Publish(spec(t, "80:80")); err != nil {
		t.Errorf("the port of one who was cut off: %v", err)
	}
}

func TestGuestLimit(t *testing.T) {
	if fileLimit() < 3*maxLeases {
		missing(t, fmt.Errorf("%d open files are not enough", fileLimit()))
	}
	path := serveGuests(t, new(guests))
	var held []*GuestConn
	for i := range maxLeases {
		c := dialGuest(t, path)
		if _, err := c.Publish(flow.PortSpec{Proto: flow.TCP, Host: addrPort(fmt.Sprintf("|%d", i+1))}); err != nil {
			t.Fatal(err)
		}
		held = append(held, c)
	}
	c := dialGuest(t, path)
	if _, err := c.Publish(spec(t, "60000:80")); asError(err).Status != http.StatusServiceUnavailable || !strings.Contains(err.Error(), "all 4096 connections are in use") {
		t.Errorf("beyond the limit: %v", err)
	}
	<-c.Done()
	var closing sync.WaitGroup
	for _, h := range held {
		closing.Go(func() { h.Close() })
	}
	closing.Wait()
	if _, err := dialGuest(t, path).Publish(spec(t, "1:80")); err != nil {
		t.Errorf("when all others have ended: %v", err)
	}
}

// What connections can make the daemon hold, with lines that they do not end, is little:
// few of them may be long, and who has ended one holds nothing.
func TestGuestLongLines(t *testing.T) {
	s := NewGuestServer(new(guests), nil)
	path := listen(t, s.Serve)
	amid := func(n int) {
		t.Helper()
		count := func() int { s.long.mu.Lock(); defer s.long.mu.Unlock(); return s.long.n }
		for until := time.Now().Add(10 * time.Second); count() != n; time.Sleep(time.Millisecond) {
			if time.Now().After(until) {
				t.Fatalf("%d long lines, want %d", count(), n)
			}
		}
	}
	const publish = `{"publish":{"proto":"tcp","parentPort":80}}`
	var held []net.Conn
	for range maxLong {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		io.WriteString(c, publish+strings.Repeat(" ", maxLine-len(publish)-1))
		held = append(held, c)
	}
	amid(maxLong)
	const want = `{"error":"read request: 256 others are longer than 512 bytes, too","status":503}`
	if got := talk(t, path, strings.Repeat(" ", shortLine+1)); len(got) != 1 || got[0] != want {
		t.Errorf("one more: %q, want %s", got, want)
	}
	if got := talk(t, path, publish+strings.Repeat(" ", shortLine-len(publish)-1)+"\n"); len(got) != 1 || !strings.HasPrefix(got[0], `{"port"`) {
		t.Errorf("a short one: %q", got)
	}
	io.WriteString(held[0], "\n")
	if line, err := bufio.NewReader(held[0]).ReadString('\n'); err != nil || !strings.HasPrefix(line, `{"port"`) {
		t.Errorf("the end of a long one: %q, %v", line, err)
	}
	amid(maxLong - 1) // although its connection is there
	for _, c := range held[1:] {
		c.Close()
	}
	amid(0)
}

// engineOf starts a shell in namespaces of its own. run has it run the test binary,
// through the words of prefix, and returns what that says about the socket at path.
func engineOf(t *testing.T, path string) (pid int, run func(prefix string) string) {
	t.Helper()
	cmd := exec.Command("sh", "-c", `while read -r line; do eval "$line"; done`)
	cmd.Env = append(os.Environ(), dialGuestSocket+"="+path)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}}
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		missing(t, fmt.Errorf("namespaces: %w", err))
	}
	t.Cleanup(func() { in.Close(); cmd.Wait() })
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(out)
	return cmd.Process.Pid, func(prefix string) string {
		fmt.Fprintf(in, "%s '%s' </dev/null 2>&1\n", prefix, exe)
		line, err := lines.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(line)
	}
}

func TestGuestPeers(t *testing.T) {
	b := new(guests)
	path := serveGuests(t, b)
	pid, run := engineOf(t, path)
	b.mu.Lock()
	b.netns = fmt.Sprintf("/proc/%d/ns/net", pid)
	b.mu.Unlock()
	if got := run(""); got != "<nil>" {
		t.Errorf("a process of the engine: %q", got)
	}
	if got := run("unshare -n"); !strings.Contains(got, errOutside.Error()) {
		t.Errorf("a process of a container: %q", got)
	}
	if _, err := dialGuest(t, path).Publish(spec(t, "81:80")); err != nil {
		t.Errorf("the daemon's user: %v", err)
	}
	_, other := engineOf(t, path)
	if got := other(""); !strings.Contains(got, errOutside.Error()) {
		t.Errorf("a process of another engine: %q", got)
	}
}
