package api

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/slipway-net/slipway/internal/flow"
)

// dialSocket makes the test binary a process that asks the socket of that path and
// prints the answer's status: it is started in namespaces and as users of its own.
const dialSocket = "SLIPWAY_TEST_DIAL"

// dialGuestSocket is the same for a guest.sock, where it publishes a port.
const dialGuestSocket = "SLIPWAY_TEST_DIAL_GUEST"

func TestMain(m *testing.M) {
	if path := os.Getenv(dialSocket); path != "" {
		_, err := NewClient("x", path).Status(context.Background())
		fmt.Println(err)
		os.Exit(0)
	}
	if path := os.Getenv(dialGuestSocket); path != "" {
		c, err := DialGuest(path)
		if err == nil {
			_, err = c.Publish(flow.PortSpec{Proto: flow.TCP, Host: netip.MustParseAddrPort("0.0.0.0:80")})
		}
		fmt.Println(err)
		os.Exit(0)
	}
	// Under nohup HUP is ignored, and a shell cannot trap what was ignored when it
	// started. What we catch our children get with its default.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP)
	goleak.VerifyTestMain(m)
}

// missing skips a test that cannot run here, or fails it where skips are not allowed.
func missing(t *testing.T, err error) {
	t.Helper()
	if os.Getenv("NETNS_TESTS") == "require" {
		t.Fatalf("not available: %v", err)
	}
	t.Skipf("not available: %v", err)
}

// fake is a Backend that runs commands on the host.
type fake struct {
	book
	status Status
	flows  []*flow.Flow
	refuse error
}

func (f *fake) Status() Status      { return f.status }
func (f *fake) Flows() []*flow.Flow { return f.flows }

func (f *fake) Info() Info { return NewInfo() }

func (f *fake) Exec(_ context.Context, r ExecRequest, stdio [3]*os.File) (Process, error) {
	if f.refuse != nil {
		return nil, f.refuse
	}
	cmd := exec.Command(r.Args[0], r.Args[1:]...)
	cmd.Env, cmd.Dir = r.Env, string(r.Dir)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdio[0], stdio[1], stdio[2]
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return &fakeProcess{cmd}, nil
}

type fakeProcess struct{ cmd *exec.Cmd }

func (p *fakeProcess) PID() int                   { return p.cmd.Process.Pid }
func (p *fakeProcess) Signal(sig os.Signal) error { return p.cmd.Process.Signal(sig) }

func (p *fakeProcess) Wait() (int, error) {
	err := p.cmd.Wait()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		return 0, err
	}
	if w := p.cmd.ProcessState.Sys().(syscall.WaitStatus); w.Signaled() {
		return 128 + int(w.Signal()), nil
	}
	return p.cmd.ProcessState.ExitCode(), nil
}

// serve runs a Server until the test ends and returns its socket.
func serve(t *testing.T, b Backend) string {
	t.Helper()
	return serveWith(t, b, func(*Server) {})
}

// serveWith is serve, after set has changed the Server.
func serveWith(t *testing.T, b Backend, set func(*Server)) string {
	t.Helper()
	s := NewServer(b, nil)
	set(s)
	return listen(t, s.Serve)
}

// listen runs a server until the test ends and returns its socket.
func listen(t *testing.T, server func(context.Context, *net.UnixListener) error) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "api") // t.TempDir may be longer than a socket's path
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "s")
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- server(ctx, ln) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve = %v", err)
		}
	})
	return path
}

func client(t *testing.T, path string) *Client {
	t.Helper()
	c := NewClient("a", path)
	t.Cleanup(c.Close)
	return c
}

func TestStatus(t *testing.T) {
	want := Status{Engine: Engine{Name: "a", PID: 7}, Counters: map[string]map[string]int64{"tcp": {"denied": 3}}}
	got, err := client(t, serve(t, &fake{status: want})).Status(t.Context())
	if err != nil || got.Engine.Name != "a" || got.Engine.PID != 7 || got.Counters["tcp"]["denied"] != 3 {
		t.Errorf("Status = %+v, %v", got, err)
	}
}

func TestFlows(t *testing.T) {
	b := new(fake)
	for i := range uint64(3) {
		f := &flow.Flow{ID: 3 - i, Tuple: flow.Tuple{
			Proto:  flow.UDP,
			Guest:  netip.MustParseAddrPort("192.168.65.3:40000"),
			Target: netip.MustParseAddrPort("[2001:db8::7]:53"),
		}, Decided: flow.Direct, Path: flow.Netstack}
		f.ToHost.Add(12)
		f.SetState(flow.Open)
		b.flows = append(b.flows, f)
	}
	c := client(t, serve(t, b))
	for limit, want := range map[int]int{0: 3, 2: 2, 5: 3} {
		l, err := c.Flows(t.Context(), limit)
		if err != nil || len(l.Flows) != want || l.Total != 3 || l.Flows[0].ID != 3 {
			t.Errorf("Flows(%d) = %+v, %v; want %d of 3, newest first", limit, l, err, want)
			continue
		}
		f := l.Flows[0]
		if f.Target.String() != "[2001:db8::7]:53" || f.ToHost != (Count{12, 1}) || f.State != "open" || f.Proto != flow.UDP {
			t.Errorf("flow %+v", f)
		}
	}
}

func TestRequestsRefused(t *testing.T) {
	path := serve(t, new(fake))
	dial := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}}
	tests := []struct {
		name, method, url, host string
		header                  [2]string
		want                    int
	}{
		{"ours", "GET", "/v1/status", Host, [2]string{}, 200},
		{"another host", "GET", "/v1/status", "localhost", [2]string{}, 403},
		{"rebound name", "GET", "/v1/status", "evil.example.org", [2]string{}, 403},
		{"host with port", "GET", "/v1/status", Host + ":80", [2]string{}, 403},
		{"origin", "GET", "/v1/status", Host, [2]string{"Origin", "http://slipway.internal"}, 403},
		{"null origin", "GET", "/v1/status", Host, [2]string{"Origin", "null"}, 403},
		{"referer", "GET", "/v1/flows", Host, [2]string{"Referer", "http://example.org/"}, 403},
		{"fetch metadata", "GET", "/v1/flows", Host, [2]string{"Sec-Fetch-Site", "none"}, 403},
		{"wrong method", "POST", "/v1/status", Host, [2]string{}, 405},
		{"unknown path", "GET", "/v2/status", Host, [2]string{}, 404},
		{"rootlesskit's", "GET", "/v1/ports", "rootlesskit", [2]string{}, 200},
		{"rootlesskit's of a browser", "GET", "/v1/ports", "rootlesskit", [2]string{"Origin", "null"}, 403},
		{"ports with an unknown method", "PUT", "/v1/ports", Host, [2]string{}, 405},
		{"port without a number", "DELETE", "/v1/ports/web", Host, [2]string{}, 400},
		{"port with a negative number", "DELETE", "/v1/ports/-1", Host, [2]string{}, 400},
		{"port that is not there", "DELETE", "/v1/ports/7", Host, [2]string{}, 404},
		{"limit of 0", "GET", "/v1/flows?limit=0", Host, [2]string{}, 400},
		{"limit of words", "GET", "/v1/flows?limit=all", Host, [2]string{}, 400},
		{"limit too high", "GET", "/v1/flows?limit=100001", Host, [2]string{}, 400},
		{"exec without upgrade", "POST", "/v1/exec", Host, [2]string{}, 400},
		{"exec of nothing", "POST", "/v1/exec", Host, [2]string{"Upgrade", execProtocol}, 400},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r, err := http.NewRequest(tt.method, "http://x"+tt.url, strings.NewReader("{}"))
			if err != nil {
				t.Fatal(err)
			}
			r.Host = tt.host
			if tt.header[0] != "" {
				r.Header.Set(tt.header[0], tt.header[1])
			}
			resp, err := dial.RoundTrip(r)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			if resp.StatusCode != tt.want {
				b, _ := io.ReadAll(resp.Body)
				t.Errorf("status %d, want %d: %s", resp.StatusCode, tt.want, b)
			}
		})
	}
}

// askFrom asks the socket from a process of its own and returns the error it got.
func askFrom(t *testing.T, path string, attr *syscall.SysProcAttr) string {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{dialSocket + "=" + path}
	cmd.SysProcAttr = attr
	out, err := cmd.CombinedOutput()
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSPC) {
		missing(t, fmt.Errorf("namespaces: %w", err))
	}
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return strings.TrimSpace(string(out))
}

func TestPeers(t *testing.T) {
	path := serve(t, new(fake))
	ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}}
	groups := []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}}
	tests := []struct {
		name string
		attr *syscall.SysProcAttr
		want string
	}{
		{"ours", &syscall.SysProcAttr{}, "<nil>"},
		{"another user namespace", &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER, UidMappings: ids, GidMappings: groups}, errInside.Error()},
		{"a rootless engine", &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER | unix.CLONE_NEWNET, UidMappings: ids, GidMappings: groups}, errInside.Error()},
	}
	if os.Geteuid() == 0 {
		tests = append(tests, struct {
			name string
			attr *syscall.SysProcAttr
			want string
		}{"a root engine", &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}, errInside.Error()})
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := askFrom(t, path, tt.attr); !strings.Contains(got, tt.want) {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

func TestOtherUserIsRefused(t *testing.T) {
	if os.Geteuid() != 0 {
		missing(t, errors.New("becoming another user needs root"))
	}
	path := serve(t, new(fake))
	// What the modes of a state directory would forbid already.
	for p, mode := range map[string]os.FileMode{path: 0o777, filepath.Dir(path): 0o755} {
		if err := os.Chmod(p, mode); err != nil {
			t.Fatal(err)
		}
	}
	// The test binary may be in a directory that the other user does not see, so the
	// credentials are those of a thread of ours.
	got := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlock: the thread ends with the goroutine
		if _, _, errno := syscall.RawSyscall(syscall.SYS_SETRESUID, 12345, 12345, 12345); errno != 0 {
			got <- errno
			return
		}
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err == nil {
			err = unix.Connect(fd, &unix.SockaddrUnix{Name: path})
		}
		if err != nil {
			got <- err
			return
		}
		f := os.NewFile(uintptr(fd), "client")
		defer f.Close()
		fmt.Fprintf(f, "GET /v1/status HTTP/1.1\r\nHost: %s\r\n\r\n", Host)
		resp, err := http.ReadResponse(bufio.NewReader(f), nil)
		if err != nil {
			got <- err
			return
		}
		got <- readError(resp)
	}()
	err := <-got
	if errors.Is(err, unix.EINVAL) {
		missing(t, errors.New("this user namespace has one user only"))
	}
	if err == nil || !strings.Contains(err.Error(), "user 12345 is not 0") {
		t.Errorf("got %v", err)
	}
}

func TestNotRunning(t *testing.T) {
	dir := t.TempDir()
	c := client(t, filepath.Join(dir, "none"))
	if _, err := c.Status(t.Context()); !errors.Is(err, ErrNotRunning) {
		t.Errorf("Status without a socket: %v", err)
	}
	if _, err := c.Exec(t.Context(), ExecRequest{Args: []string{"true"}}, [3]*os.File{}, nil); !errors.Is(err, ErrNotRunning) {
		t.Errorf("Exec without a socket: %v", err)
	}
}

// Connections beyond the limit wait; they are served when others end.
func TestConnectionLimit(t *testing.T) {
	path := serve(t, new(fake))
	var held []net.Conn
	for range maxConns {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, c)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	c := client(t, path)
	if _, err := c.Status(ctx); err == nil {
		t.Error("answered beyond the limit")
	}
	for _, h := range held {
		h.Close()
	}
	if _, err := c.Status(t.Context()); err != nil {
		t.Errorf("not answered although all others ended: %v", err)
	}
}
