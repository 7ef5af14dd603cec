package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/slipway-net/slipway/internal/api"
	"github.com/slipway-net/slipway/internal/flow"
)

// fakeEngine is an engine that has nothing but a control socket: ports are only noted.
// Ports 1..99 are taken by others, and it has room for maxFake.
type fakeEngine struct {
	dir string

	mu    sync.Mutex // guards the fields below
	ports []api.Port
	last  uint64
	flows []*flow.Flow
}

const maxFake = 8

func (f *fakeEngine) Status() api.Status   { return api.Status{} }
func (f *fakeEngine) Flows() []*flow.Flow  { f.mu.Lock(); defer f.mu.Unlock(); return f.flows }
func (f *fakeEngine) Info() (i api.Info)   { i = api.NewInfo(); i.StateDir = f.dir; return i }
func (f *fakeEngine) NetNS() string        { return "/proc/self/ns/net" }
func (f *fakeEngine) list() (l []api.Port) { return append([]api.Port{}, f.ports...) }

func (f *fakeEngine) Ports(context.Context) []api.Port {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.list()
}

func (f *fakeEngine) Exec(context.Context, api.ExecRequest, [3]*os.File) (api.Process, error) {
	return nil, errors.ErrUnsupported
}

func (f *fakeEngine) AddPort(_ context.Context, owner string, s flow.PortSpec) (api.Port, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch p := s.Host.Port(); {
	case p > 0 && p < 100:
		return api.Port{}, &api.Error{Message: fmt.Sprintf("publish %v: port %d is taken by nginx (pid 812)", s, p), Hint: "choose another", Status: http.StatusConflict}
	case len(f.ports) >= maxFake:
		return api.Port{}, &api.Error{Message: fmt.Sprintf("publish %v: too many", s), Status: http.StatusServiceUnavailable}
	}
	f.last++
	if s.Host.Port() == 0 {
		s.Host = netip.AddrPortFrom(s.Host.Addr(), uint16(40000+f.last))
	}
	listens := []netip.AddrPort{s.Host}
	if !s.Host.Addr().IsValid() {
		listens = []netip.AddrPort{
			netip.AddrPortFrom(netip.IPv4Unspecified(), s.Host.Port()), netip.AddrPortFrom(netip.IPv6Unspecified(), s.Host.Port()),
		}
	}
	reaches := s.Guest
	if !reaches.Addr().IsValid() {
		reaches = netip.AddrPortFrom(netip.MustParseAddr("192.168.65.3"), reaches.Port())
	}
	p := api.Port{ID: f.last, Spec: api.SpecOf(s), Owner: owner, Since: time.Now(), Listens: listens, Reaches: reaches}
	f.ports = append(f.ports, p)
	return p, nil
}

func (f *fakeEngine) RemovePort(id uint64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i, p := range f.ports {
		if p.ID == id {
			f.ports = append(f.ports[:i:i], f.ports[i+1:]...)
			return nil
		}
	}
	return &api.Error{Message: fmt.Sprintf("withdraw port %d: no such published port", id), Status: http.StatusNotFound}
}

// pretend serves a fakeEngine as slipway finds engines, until the test ends.
func pretend(t *testing.T, name string) *fakeEngine {
	t.Helper()
	root := "/run/slipway"
	if d := os.Getenv("XDG_RUNTIME_DIR"); d != "" {
		root = filepath.Join(d, "slipway")
	}
	f := &fakeEngine{dir: filepath.Join(root, name)}
	if err := os.MkdirAll(f.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	lock, err := os.Create(filepath.Join(f.dir, "lock"))
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(f.dir, "api.sock"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- api.NewServer(f, nil).Serve(ctx, ln) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
		lock.Close()
		os.RemoveAll(f.dir)
		os.Remove(filepath.Join(root, "lock"))
		os.Remove(root) // unless there is another
	})
	return f
}

// columns are a table's cells.
func columns(out string) (rows [][]string) {
	for l := range strings.Lines(out) {
		rows = append(rows, strings.Fields(l))
	}
	return rows
}

func TestPorts(t *testing.T) {
	pretend(t, "web")
	r := slipway(t, "ports", "add", "web", "8080:80", "127.0.0.1:5353:53/udp", "[::1]:0:[fd00::2]:22")
	want := [][]string{
		{"ID", "PROTO", "LISTEN", "GUEST"}, {"1", "tcp", "*:8080", "192.168.65.3:80"},
		{"2", "udp", "127.0.0.1:5353", "192.168.65.3:53"}, {"3", "tcp", "[::1]:40003", "[fd00::2]:22"},
	}
	if got := columns(r.stdout); r.code != 0 || r.stderr != "" || fmt.Sprint(got) != fmt.Sprint(want) {
		t.Fatalf("add: status %d, %s, stderr %s", r.code, r.stdout, r.stderr)
	}
	for _, args := range [][]string{{"ports"}, {"ports", "ls"}, {"ports", "web"}, {"ports", "ls", "web"}} {
		r := slipway(t, args...)
		rows := columns(r.stdout)
		if r.code != 0 || len(rows) != 4 || len(rows[0]) != len(rows[3]) || strings.Join(rows[3][:5], " ") != "web 3 tcp [::1]:40003 [fd00::2]:22" {
			t.Errorf("%v: status %d, %s%s", args, r.code, r.stdout, r.stderr)
		}
	}
	// By ID, as asked, and with the port that was chosen, all without the engine's name.
	if r := slipway(t, "ports", "rm", "1", "127.0.0.1:5353:53/udp", "[::1]:40003:[fd00::2]:22"); r.code != 0 || r.stdout+r.stderr != "" {
		t.Errorf("rm: status %d, %s%s", r.code, r.stdout, r.stderr)
	}
	if rows := columns(slipway(t, "ports").stdout); len(rows) != 1 {
		t.Errorf("still there: %v", rows)
	}
}

// A container's port is shown with its name and where clients get to, and is withdrawn by
// any of the addresses that are shown.
func TestPortsOfContainers(t *testing.T) {
	f := pretend(t, "web")
	at := func(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }
	port := func(host, behind, reaches, owner, container, program string) {
		f.last++
		s := flow.PortSpec{Proto: flow.TCP, Host: at(host), Guest: netip.AddrPortFrom(netip.Addr{}, at(host).Port()), Behind: at(behind)}
		f.ports = append(f.ports, api.Port{ID: f.last, Spec: api.SpecOf(s), Owner: owner, Listens: []netip.AddrPort{s.Host}, Reaches: at(reaches), Container: container, Program: program})
	}
	port("0.0.0.0:8080", "172.17.0.2:80", "192.168.65.3:8080", "guest:812/1", "web", "")
	port("127.0.0.1:8081", "172.17.0.2:80", "172.17.0.2:80", "guest:813/2", "", "slipway-docker-\x1b")
	port("127.0.0.1:8082", "172.17.0.2:81", "172.17.0.2:81", "guest:814/3", "", "")
	port("127.0.0.1:8083", "172.17.0.2:81", "172.17.0.2:81", "docker", "", "")
	rows := columns(slipway(t, "ports").stdout)
	for i, want := range []string{
		"192.168.65.3:8080 (172.17.0.2:80) - docker: web 0", "172.17.0.2:80 - guest (pid 813, slipway-docker-?) 0",
		"172.17.0.2:81 - guest (pid 814) 0", "172.17.0.2:81 - docker 0",
	} {
		if got := strings.Join(rows[i+1][4:], " "); !strings.HasPrefix(got, want) {
			t.Errorf("port %d is shown as %s, want %s", i+1, got, want)
		}
	}
	r := slipway(t, "ports", "rm", "0.0.0.0:8080:80", "127.0.0.1:8081:172.17.0.2:80", "127.0.0.1:8082:8082", "127.0.0.1:8083:83")
	if r.code != 125 || len(f.ports) != 1 || r.stderr != "slipway: withdraw 127.0.0.1:8083:83/tcp on web: not published\n"+
		"hint: did you mean 127.0.0.1:8083:81/tcp (ID 4)? All are listed by slipway ports ls web\n" {
		t.Errorf("rm: status %d, %s, left %v", r.code, r.stderr, f.ports)
	}
}

func TestPortsJSON(t *testing.T) {
	f := pretend(t, "web")
	list := func(args ...string) []enginePort {
		t.Helper()
		r := slipway(t, append(append([]string{"ports"}, args...), "--json")...)
		var v struct{ Ports []enginePort }
		if err := json.Unmarshal([]byte(r.stdout), &v); err != nil || r.code != 0 || v.Ports == nil {
			t.Fatalf("%v: status %d, %v, %s%s", args, r.code, err, r.stdout, r.stderr)
		}
		return v.Ports
	}
	if got := list("ls"); len(got) != 0 {
		t.Errorf("ports of nobody: %v", got)
	}
	added := list("add", "0:7-9", "--source-ip", "gateway", "--proxy-protocol")
	if len(added) != 3 || added[0].Engine != "web" || added[0].Spec.ParentPort == 0 || added[0].Spec.SourceIP != "gateway" || !added[0].Spec.ProxyProtocol {
		t.Errorf("added %+v", added)
	}
	for _, got := range [][]enginePort{list(), list("ls"), list("web"), list("ls", "web")} {
		if fmt.Sprint(got) != fmt.Sprint(added) {
			t.Errorf("list %+v, added %+v", got, added)
		}
	}
	if p := f.Ports(t.Context())[0]; p.Owner == "" {
		t.Error("the port has no owner")
	}
}

// Each port of a range is published by itself, and at the limit the rest is not tried.
func TestPortsAddInPart(t *testing.T) {
	f := pretend(t, "web")
	r := slipway(t, "ports", "add", "98-101:98-101")
	lines := strings.Split(strings.TrimSpace(r.stderr), "\n")
	if r.code != 125 || len(columns(r.stdout)) != 3 || len(f.Ports(t.Context())) != 2 || len(lines) != 3 ||
		lines[1] != "slipway: publish 99:99/tcp: port 99 is taken by nginx (pid 812)" || lines[2] != "hint: choose another" {
		t.Errorf("status %d, %s%s", r.code, r.stdout, r.stderr)
	}
	r = slipway(t, "ports", "add", "1000-60999:1-60000")
	if r.code != 125 || len(f.Ports(t.Context())) != maxFake || len(columns(r.stdout)) != maxFake-2+1 ||
		!strings.Contains(r.stderr, "too many\nslipway: publish from 1007:8/tcp on: 59993 ports not tried\n") {
		t.Errorf("status %d, %s%s", r.code, r.stdout, r.stderr)
	}
	r = slipway(t, "ports", "rm", "web", "98-101:98-101", "77")
	if want := "slipway: withdraw 98:98/tcp on web: not published\nslipway: withdraw 99:99/tcp on web: not published\n" +
		"slipway: withdraw port 77 on web: not published\nhint: slipway ports ls web\n"; r.code != 125 || r.stderr != want || len(f.Ports(t.Context())) != maxFake-2 {
		t.Errorf("status %d, %s", r.code, r.stderr)
	}
}

// What a SPEC leaves out was not asked for, and what may have been meant is named, also for
// a port of the host where an ID belongs.
func TestPortsRemoveOthers(t *testing.T) {
	f := pretend(t, "web")
	slipway(t, "ports", "add", "8080:127.0.0.1:80", "192.0.2.2:8081:81", "127.0.0.1:8081:81/udp", "8082:82", "127.0.0.1:8000-8003:1-4")
	for arg, want := range map[string]string{ // the hint's beginning
		"8080:80":                     "did you mean 8080:127.0.0.1:80/tcp (ID 1)?",
		"8080:192.168.65.3:80":        "did you mean 8080:127.0.0.1:80/tcp (ID 1)?",
		"8081:81":                     "did you mean 192.0.2.2:8081:81/tcp (ID 2) or 127.0.0.1:8081:81/udp (ID 3)?",
		"192.0.2.2:8081:82":           "did you mean 192.0.2.2:8081:81/tcp (ID 2) or 127.0.0.1:8081:81/udp (ID 3)?",
		"0.0.0.0:8082:82":             "did you mean 8082:82/tcp (ID 4)?",
		"8082:82/udp":                 "did you mean 8082:82/tcp (ID 4)?",
		"8082:172.17.0.2:82":          "did you mean 8082:82/tcp (ID 4)?",
		"8000-8001:1-2":               "did you mean 127.0.0.1:8000:1/tcp (ID 5) or 127.0.0.1:8001:2/tcp (ID 6)?",
		"8082:1 8082:2 8000-8003:1-4": "did you mean 8082:82/tcp (ID 4) or 127.0.0.1:8000:1/tcp (ID 5) or 127.0.0.1:8001:2/tcp (ID 6) or 127.0.0.1:8002:3/tcp (ID 7) or 1 more?",
		"8080":                        "did you mean 8080:127.0.0.1:80/tcp (ID 1)?",
		"8081":                        "did you mean 192.0.2.2:8081:81/tcp (ID 2) or 127.0.0.1:8081:81/udp (ID 3)?",
		"8099":                        "",
		"8099:80":                     "",
		"73616":                       "", // 8080 in 16 bits
	} {
		if want != "" {
			want += " All are listed by "
		}
		r := slipway(t, append([]string{"ports", "rm", "web"}, strings.Fields(arg)...)...)
		first, hint, _ := strings.Cut(r.stderr, "\nhint: ")
		if r.code != 125 || !strings.HasSuffix(first, " on web: not published") || hint != want+"slipway ports ls web\n" || len(f.Ports(t.Context())) != maxFake {
			t.Errorf("rm %s: status %d, %s", arg, r.code, r.stderr)
		}
	}
	// What the same command has withdrawn is not what was meant.
	if r := slipway(t, "ports", "rm", "web", "8003:9", "127.0.0.1:8003:4", "8003:8"); !strings.HasSuffix(r.stderr, "\nhint: slipway ports ls web\n") || len(f.Ports(t.Context())) != maxFake-1 {
		t.Errorf("of one that is withdrawn then: %s", r.stderr)
	}
	if r := slipway(t, "ports", "rm", "web", "127.0.0.1:8002:3", "8002:9"); !strings.HasSuffix(r.stderr, "\nhint: slipway ports ls web\n") || len(f.Ports(t.Context())) != maxFake-2 {
		t.Errorf("of one that is withdrawn: %s", r.stderr)
	}
	for i, arg := range []string{"8080:127.0.0.1:80/tcp", "192.0.2.2:8081:81/tcp", "127.0.0.1:8081:81/udp", "8082:82/tcp", "127.0.0.1:8000:192.168.65.3:1"} {
		if r := slipway(t, "ports", "rm", "web", arg); r.code != 0 || f.Ports(t.Context())[0].ID != uint64(i+2) {
			t.Errorf("rm %s: status %d, %s, left %v", arg, r.code, r.stderr, f.Ports(t.Context()))
		}
	}
}

func TestPortsWhichEngine(t *testing.T) {
	check := func(hint string, args ...string) {
		t.Helper()
		r := slipway(t, append([]string{"ports"}, args...)...)
		if r.code != 125 || !strings.HasPrefix(r.stderr, "slipway: choose engine: ") || !strings.Contains(r.stderr, hint) {
			t.Errorf("%v: status %d, %s", args, r.code, r.stderr)
		}
	}
	check("hint: slipway run", "add", "8080:80")
	three, four := pretend(t, "3"), pretend(t, "four")
	check("hint: running: 3, four", "add", "8080:80")
	check("hint: running: 3, four", "rm", "3") // a number alone is an ID
	range56 := pretend(t, "5-6")
	for _, args := range [][]string{{"add", "3", "8080:80"}, {"add", "four", "8080:80"}, {"rm", "3", "1"}, {"add", "5-6", "8081:81"}, {"rm", "5-6", "1"}} {
		if r := slipway(t, append([]string{"ports"}, args...)...); r.code != 0 {
			t.Errorf("%v: %s", args, r.stderr)
		}
	}
	if len(range56.Ports(t.Context())) != 0 || range56.last != 1 {
		t.Errorf("5-6 has %v", range56.Ports(t.Context()))
	}
	if len(three.Ports(t.Context())) != 0 || len(four.Ports(t.Context())) != 1 {
		t.Errorf("3 has %v, four has %v", three.Ports(t.Context()), four.Ports(t.Context()))
	}
	if rows := columns(slipway(t, "ports").stdout); len(rows) != 2 || rows[1][0] != "four" {
		t.Errorf("of all: %v", rows)
	}
}

// A wrong -p is said before anything is started.
func TestPublishErrors(t *testing.T) {
	pretend(t, "web")
	tests := []struct {
		args []string
		want string // in the first line
	}{
		{[]string{"run", "-p", "8080", "--", "true"}, `--publish: port "8080": must be [HOSTIP:]HOSTPORT`},
		{[]string{"run", "-p", "8080", "--", "true"}, `GUESTPORT[/tcp|udp]; 0:8080 is any port of the host`},
		{[]string{"run", "-p", "auto,80", "--", "true"}, `--publish: port "80": must be [HOSTIP:]HOSTPORT`},
		{[]string{"run", "-p", "80:80", "-p", "80:81", "--", "true"}, "--publish: port 80/tcp of the host is asked for twice"},
		{[]string{"run", "--publish-bind", "all", "--", "true"}, `--publish-bind: "all" is not allowed: must be "as-asked", `},
		{[]string{"run", "--source-ip", "mine", "--", "true"}, `--source-ip: "mine" is not allowed`},
		{[]string{"attach", "--pid", "1", "-p", "http:80"}, "--publish: "},
		{[]string{"ports", "add"}, "SPEC is missing"},
		{[]string{"ports", "add", "web"}, "SPEC is missing"},
		{[]string{"ports", "add", "8000-8010"}, `port "8000-8010": must be [HOSTIP:]HOSTPORT:[GUESTIP:]GUESTPORT[/tcp|udp]; 8000-8010:8000-8010 are the same`},
		{[]string{"ports", "add", "0"}, `port "0": must be [HOSTIP:]HOSTPORT`},
		{[]string{"ports", "add", "8000-8010", "8080:80"}, `port "8000-8010": must be `},
		{[]string{"ports", "rm", "8000-8010"}, `port "8000-8010": must be an ID of ports ls, or a SPEC like 8080:80`},
		{[]string{"ports", "add", "web", "80:80/sctp"}, `protocol "sctp" is not tcp or udp`},
		{[]string{"ports", "add", "web", "80:80", "--source-ip", "x"}, `--source-ip: "x" is not allowed: must be preserve or gateway`},
		{[]string{"ports", "add", "../x", "80:80"}, "../x"},
		{[]string{"ports", "rm", "web"}, "ID or SPEC is missing"},
		{[]string{"ports", "add", "web", "--proxy-protocol", "1:2/udp"}, "--proxy-protocol: 1:2/udp: it is for TCP only"},
		{[]string{"ports", "rm", "web", "0:80"}, "0 names no port"},
		{[]string{"ports", "rm", "web", "foo"}, `port "foo": must be an ID of ports ls, or a SPEC like 8080:80`},
		{[]string{"ports", "rm", "web", "0"}, `port "0": must be an ID of ports ls, or a SPEC like 8080:80`},
		{[]string{"ports", "rm", "web", "-1"}, "slipway ports rm"},
		{[]string{"docker", "-x"}, "slipway docker"},
	}
	for _, tt := range tests {
		r := slipway(t, tt.args...)
		lines := strings.Split(strings.TrimSpace(r.stderr), "\n")
		if r.code != 125 || r.stdout != "" || len(lines) != 2 || !strings.HasPrefix(lines[0], "slipway: read command line on ") ||
			!strings.Contains(lines[0], tt.want) || !strings.HasPrefix(lines[1], "hint: ") {
			t.Errorf("%v: status %d, %s%s", tt.args, r.code, r.stdout, r.stderr)
		}
	}
	for _, args := range [][]string{{"ports", "nobody"}, {"ports", "add", "nobody", "8080:80"}, {"ports", "rm", "nobody", "1"}, {"docker", "nobody", "--", "ps"}} {
		if r := slipway(t, args...); r.code != 125 || r.stderr != "slipway: ask engine nobody: not running\nhint: slipway ls lists the running engines\n" {
			t.Errorf("%v: status %d, %s", args, r.code, r.stderr)
		}
	}
}

// --publish goes over the file's ports; auto leaves them alone.
func TestPublishSettings(t *testing.T) {
	file := filepath.Join(t.TempDir(), "s.toml")
	if err := os.WriteFile(file, []byte("publish = [\"1:1\"]\n[engine.web]\nkind = \"dockerd\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	pretend(t, "running")
	tests := []struct {
		args []string
		want []string // lines
	}{
		{nil, []string{`publish = ["1:1/tcp"] # ` + file + ":1", "publish_auto = false # default"}},
		{[]string{"-p", "auto"}, []string{`publish = ["1:1/tcp"] # ` + file + ":1", "publish_auto = true # --publish"}},
		{[]string{"-p", "2:2", "--publish", "3:3/udp"}, []string{`publish = ["2:2/tcp", "3:3/udp"] # --publish`}},
		{[]string{"--publish-bind", "loopback-only", "--source-ip", "gateway"},
			[]string{`publish_bind = "loopback-only" # --publish-bind`, `source_ip = "gateway" # --source-ip`}},
		{[]string{"running"}, []string{"publish_auto = false # default"}},
		{[]string{"web"}, []string{`[engine.web]`, `kind = "dockerd" # ` + file + ":3"}},
	}
	for _, tt := range tests {
		r := slipway(t, append([]string{"config", "show", "--config", file}, tt.args...)...)
		var lines []string
		for l := range strings.Lines(r.stdout) {
			lines = append(lines, strings.Join(strings.Fields(l), " "))
		}
		for _, want := range tt.want {
			if r.code != 0 || !strings.Contains("\n"+strings.Join(lines, "\n")+"\n", "\n"+want+"\n") {
				t.Errorf("%v: no line %s in\n%s%s", tt.args, want, r.stdout, r.stderr)
			}
		}
	}
}

// The docker client gets our socket, whatever the environment says, and its own words.
func TestDocker(t *testing.T) {
	f := pretend(t, "web")
	if r := slipway(t, "docker", "web", "--", "ps"); r.code != 125 || !strings.Contains(r.stderr, "slipway: docker on web: there is no "+f.dir+"/docker.sock\nhint: ") {
		t.Errorf("without dockerd: status %d, %s", r.code, r.stderr)
	}
	if err := os.WriteFile(filepath.Join(f.dir, dockerSocket), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	bin := t.TempDir()
	t.Setenv("PATH", bin)
	if r := slipway(t, "docker", "web", "ps"); r.code != codeNotFound || !strings.Contains(r.stderr, "slipway: exec on docker: not found in PATH\nhint: ") {
		t.Errorf("without client: status %d, %s", r.code, r.stderr)
	}
	script := "#!/bin/sh\necho \"$@\" $DOCKER_HOST $DOCKER_CONTEXT $DOCKER_TLS_VERIFY\nexit 7\n"
	if err := os.WriteFile(filepath.Join(bin, "docker"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"DOCKER_HOST", "DOCKER_CONTEXT", "DOCKER_TLS_VERIFY"} {
		t.Setenv(name, "wrong")
	}
	host := "unix://" + f.dir + "/docker.sock"
	for _, args := range [][]string{{"--", "run", "-p", "1:1", "--json"}, {"run", "-p", "1:1", "--json"}} {
		r := slipway(t, append([]string{"docker", "web"}, args...)...)
		if want := "-H " + host + " run -p 1:1 --json " + host + "\n"; r.code != 7 || r.stdout != want {
			t.Errorf("%v: status %d, %s%s, want %s", args, r.code, r.stdout, r.stderr, want)
		}
	}
}

// A client of a published port points at the guest.
func TestPublishedFlows(t *testing.T) {
	f := pretend(t, "web")
	guest, client := netip.MustParseAddrPort("192.168.65.3:80"), netip.MustParseAddrPort("203.0.113.7:5000")
	flows := []*flow.Flow{
		{ID: 2, Tuple: flow.Tuple{Proto: flow.TCP, Guest: guest, Target: client}, Decided: flow.Published, Started: time.Now()},
		{ID: 1, Tuple: flow.Tuple{Proto: flow.TCP, Guest: guest, Target: client}, Decided: flow.Direct, Started: time.Now().Add(-time.Second)},
	}
	f.mu.Lock()
	f.flows = flows
	f.mu.Unlock()
	r := slipway(t, "flows", "web")
	for i, want := range []string{"GUEST TARGET", "192.168.65.3:80 <- 203.0.113.7:5000 - published", "192.168.65.3:80 -> 203.0.113.7:5000 - direct"} {
		if rows := columns(r.stdout); len(rows) != 3 || !strings.Contains(strings.Join(rows[i], " "), want) {
			t.Errorf("line %d is not %s:\n%s%s", i, want, r.stdout, r.stderr)
		}
	}
}

func TestCompletionOfWords(t *testing.T) {
	f := pretend(t, "web")
	if _, err := f.AddPort(t.Context(), "x", flow.PortSpec{Host: netip.MustParseAddrPort("127.0.0.1:8080")}); err != nil {
		t.Fatal(err)
	}
	tests := []struct{ words, want string }{
		{"ports rm ", "web\n:4\n"},
		{"ports rm web ", "1\t127.0.0.1:8080\n:4\n"},
		{"ports add ", "web\n:4\n"},
		{"status ", "web\n:4\n"},
		{"run --publish-bind ", "as-asked\nloopback-default\nloopback-only\n:4\n"},
		{"run --source-ip ", "preserve\ngateway\n:4\n"},
		{"run -p ", "auto\n:4\n"},
	}
	for _, tt := range tests {
		if r := slipway(t, append([]string{"__complete"}, strings.Split(tt.words, " ")...)...); r.stdout != tt.want {
			t.Errorf("%s: %q, want %q", tt.words, r.stdout, tt.want)
		}
	}
}

// An engine that does not answer is a line, a hint, and an exit status, also where
// none was named: here because whoever asks is in another network, as in an engine.
func TestNoAnswer(t *testing.T) {
	pretend(t, "web")
	for _, words := range []string{"ls", "ls --json", "status", "status --json", "ports", "ports ls --json", "flows", "flows --json"} {
		var out, errOut strings.Builder
		cmd := command(t, strings.Fields(words)...)
		cmd.Stdout, cmd.Stderr = &out, &errOut
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
		cmd.Run()
		if code(cmd) != 125 || strings.Contains(words, "json") && !json.Valid([]byte(out.String())) {
			t.Errorf("%s: status %d, %s", words, code(cmd), out.String())
		}
		if lines := strings.Split(errOut.String(), "\n"); words != "ls --json" && (len(lines) != 3 ||
			!strings.HasPrefix(lines[0], "slipway: engine web: connect api: refused: ") || !strings.Contains(lines[1], "SLIPWAY_SOCK")) {
			t.Errorf("%s: %s", words, errOut.String())
		}
	}
}
