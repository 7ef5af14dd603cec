package test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/slipway-net/slipway/test/topo"
	"golang.org/x/sys/unix"
)

// The API behind the command line: RootlessKit's client, whoever sends nonsense, too much
// or does not read, and guest.sock.

// Roles of the test binary beside those in main_linux_test.go.
const (
	roleHammer = "hammer" // many calls of the API: see hammer
	roleLease  = "lease"  // guest.sock with standard input and output
)

// sock is the path of one of the engine's sockets on the host.
func (e *engine) sock(name string) string { return e.stateDir() + "/" + e.name + "/" + name }

// ask calls the engine's API as its owner, with curl.
func (e *engine) ask(t testing.TB, method, path, body string, more ...string) (status int, text string) {
	t.Helper()
	args := append([]string{"-sS", "-m", "20", "-w", "\n%{http_code}", "-X", method, "--unix-socket", e.sock("api.sock")}, more...)
	if body != "" {
		args = append(args, "-H", "Content-Type: application/json", "--data-binary", body)
	}
	cmd := exec.Command(lookPath(t, "curl"), append(args, "http://rootlesskit"+path)...)
	e.dress(cmd)
	r := finish(t, e.net.Host, cmd, 30*time.Second)
	i := strings.LastIndexByte(r.stdout, '\n')
	if i < 0 {
		t.Errorf("%s %s: %s", method, path, r.stderr)
		return 0, ""
	}
	status, _ = strconv.Atoi(r.stdout[i+1:])
	return status, r.stdout[:i]
}

// TestPublishRootlessctl: Debian's RootlessKit client against our socket.
func TestPublishRootlessctl(t *testing.T) {
	needPublish(t, "rootlessctl")
	eachEngine(t, func(t *testing.T, g *guest) {
		e := g.engine
		tellSource(t, e.guest, enginePort)
		ctl := func(args ...string) result {
			cmd := exec.Command(lookPath(t, "rootlessctl"), append([]string{"--socket", e.sock("api.sock")}, args...)...)
			e.dress(cmd)
			return finish(t, e.net.Host, cmd, 20*time.Second)
		}
		r := ctl("add-ports", "0.0.0.0:18080:81/tcp", "127.0.0.1:18081:81/udp")
		ids := strings.Fields(r.stdout)
		if r.code != 0 || len(ids) != 2 {
			t.Fatalf("add-ports: status %d: %s%s", r.code, r.stdout, r.stderr)
		}
		expectListeners(t, g.net, "after add-ports", []string{"tcp 0.0.0.0:18080", "udp 127.0.0.1:18081"})
		reach(t, g.net, "tcp", 18080)
		reach(t, g.net, "udp", 18081)
		if r := ctl("list-ports"); r.code != 0 || !strings.Contains(r.stdout, "18080") || !strings.Contains(r.stdout, "18081") {
			t.Errorf("list-ports: status %d: %s%s", r.code, r.stdout, r.stderr)
		}
		var listed []struct {
			ID   int
			Spec struct{ Proto string }
		}
		if r := ctl("list-ports", "--json"); json.NewDecoder(strings.NewReader(r.stdout)).Decode(&listed) != nil && !strings.Contains(r.stdout, `"proto":"udp"`) {
			t.Errorf("list-ports --json: %s%s", r.stdout, r.stderr)
		}
		if r := ctl("info"); r.code != 0 || !strings.Contains(r.stdout, "slipway") {
			t.Errorf("info: status %d: %s%s", r.code, r.stdout, r.stderr)
		}
		startHolder(t, g.net, e.user, "0.0.0.0:18070")
		if r := ctl("add-ports", "0.0.0.0:18070:81/tcp"); r.code == 0 || !strings.Contains(r.stdout+r.stderr, "18070 is taken") {
			t.Errorf("a conflict: status %d: %s%s", r.code, r.stdout, r.stderr)
		}
		if r := ctl("remove-ports", ids[0], ids[1]); r.code != 0 {
			t.Errorf("remove-ports: status %d: %s%s", r.code, r.stdout, r.stderr)
		}
		expectListeners(t, g.net, "after remove-ports", []string{"tcp 0.0.0.0:18070"})
		if r := ctl("remove-ports", ids[0]); r.code == 0 {
			t.Errorf("remove-ports again: status 0: %s%s", r.stdout, r.stderr)
		}
	})
}

// TestPublishBadInput: each mistake has its HTTP status and one line that says why, and
// publishes nothing.
func TestPublishBadInput(t *testing.T) {
	needPublish(t, "curl")
	n := newTopology(t)
	e := startEngine(t, n, engineOptions{})
	startHolder(t, n, user{}, "0.0.0.0:18070")
	if status, text := e.ask(t, "POST", "/v1/ports", `{"proto":"tcp","parentPort":18060,"childPort":81}`); status != http.StatusCreated {
		t.Fatalf("POST: %d: %s", status, text)
	}
	for _, tt := range []struct {
		body string
		want int
	}{
		{``, 400},
		{`{`, 400},
		{`null`, 400},
		{`[]`, 400},
		{`"tcp"`, 400},
		{`{"proto":"tcp","parentPort":18061,"childPort":81} trailing`, 400},
		{`{"proto":"tcp","parentPort":18061,"childPort":81}{}`, 400},
		{`{"proto":"sctp","parentPort":18061,"childPort":81}`, 400},
		{`{"proto":"","parentPort":18061,"childPort":81}`, 400},
		{`{"proto":"tcp","parentPort":"18061","childPort":81}`, 400},
		{`{"proto":"tcp","parentPort":65536,"childPort":81}`, 400},
		{`{"proto":"tcp","parentPort":-1,"childPort":81}`, 400},
		{`{"proto":"tcp","parentPort":1e30,"childPort":81}`, 400},
		{`{"proto":"tcp","parentPort":18061.5,"childPort":81}`, 400},
		{`{"proto":"tcp","parentPort":18061,"childPort":65536}`, 400},
		{`{"proto":"tcp"}`, 400},
		{`{"proto":"tcp","parentIP":"localhost","parentPort":18061,"childPort":81}`, 400},
		{`{"proto":"tcp","parentIP":"300.1.1.1","parentPort":18061,"childPort":81}`, 400},
		{`{"proto":"tcp","parentIP":"fe80::1%eth0","parentPort":18061,"childPort":81}`, 400},
		{`{"proto":"tcp6","parentIP":"127.0.0.1","parentPort":18061,"childPort":81}`, 400},
		{`{"proto":"tcp","parentIP":"192.0.2.9","parentPort":18061,"childPort":81}`, 400},
		{`{"proto":"tcp","parentPort":18061,"childIP":"10.9.8.7","childPort":81}`, 400},
		{`{"proto":"tcp","parentPort":18061,"childIP":"0.0.0.0","childPort":81}`, 400},
		{`{"proto":"tcp","parentPort":18061,"childIP":"224.0.0.1","childPort":81}`, 400},
		{`{"proto":"udp","parentPort":18061,"childPort":81,"proxyProtocol":true}`, 400},
		{`{"proto":"tcp","parentPort":18061,"childPort":81,"sourceIP":"forged"}`, 400},
		{`{"proto":"tcp","parentPort":18061,"childPort":81,"behind":"nowhere"}`, 400},
		{strings.Repeat(" ", 1<<20) + `{`, 400},
		{strings.Repeat(`{"spec":`, 10000), 400},
		{`{"proto":"tcp","parentPort":18070,"childPort":81}`, 409},
		{`{"proto":"tcp","parentPort":18060,"childPort":82}`, 409}, // its own owner's, but another
		{`{"proto":"tcp","parentPort":18060,"childPort":81,"unknown":[1]}`, 201},
	} {
		body := filepath.Join(t.TempDir(), "body")
		if err := os.WriteFile(body, []byte(tt.body), 0o644); err != nil {
			t.Fatal(err)
		}
		status, text := e.ask(t, "POST", "/v1/ports", "@"+body)
		if len(tt.body) > 64<<10 && status == http.StatusRequestEntityTooLarge {
			status = 400
		}
		if status != tt.want {
			t.Errorf("POST %.90s: %d, expected %d: %s", tt.body, status, tt.want, text)
		}
		if problem := badAnswer(text); status >= 400 && problem != "" {
			t.Errorf("POST %.90s: %s: %q", tt.body, problem, text)
		}
	}
	for path, want := range map[string]int{"/v1/ports/99": 404, "/v1/ports/0": 404, "/v1/ports/x": 400, "/v1/ports/-1": 400, "/v1/ports/99999999999999999999": 400, "/v1/ports/": 404} {
		if status, text := e.ask(t, "DELETE", path, ""); status != want && !(want == 400 && status == 404) {
			t.Errorf("DELETE %s: %d, expected %d: %s", path, status, want, text)
		}
	}
	if status, _ := e.ask(t, "PUT", "/v1/ports", "{}"); status != http.StatusMethodNotAllowed {
		t.Errorf("PUT: %d", status)
	}
	if status, _ := e.ask(t, "POST", "/v1/ports", `{"proto":"tcp","parentPort":18061,"childPort":81}`, "-H", "Origin: http://example.org"); status != http.StatusForbidden {
		t.Errorf("a browser gets %d", status)
	}
	expectListeners(t, n, "after mistakes", onAll("tcp", 18060), []string{"tcp 0.0.0.0:18070"})
}

// badAnswer says what is wrong with the body of an error: RootlessKit's clients read
// "message", which is to be one line.
func badAnswer(text string) string {
	var doc struct{ Message string }
	switch err := json.Unmarshal([]byte(text), &doc); {
	case err != nil:
		return err.Error()
	case doc.Message == "":
		return "no message"
	case strings.ContainsAny(doc.Message, "\n\r"):
		return "more than a line"
	case len(doc.Message) > 500:
		return "a long message"
	}
	return ""
}

// TestPublishOwner: nobody but the socket's owner publishes by it, least of all what runs
// inside.
func TestPublishOwner(t *testing.T) {
	needPublish(t, "curl")
	eachUser(t, func(t *testing.T, n *topo.Topology, u user) {
		e := startEngine(t, n, engineOptions{user: u})
		const body = `{"proto":"tcp","parentPort":18080,"childPort":81}`
		curl := []string{"curl", "-sS", "-m", "5", "-o", "/dev/null", "-w", "%{http_code}", "--unix-socket", e.sock("api.sock"), "--data-binary", body, "http://rootlesskit/v1/ports"}
		if r := e.exec(t, curl...); r.code == 0 && r.stdout != "403" {
			t.Errorf("the engine itself gets %s", r.stdout)
		}
		if isRoot() {
			cmd := exec.Command(lookPath(t, "curl"), curl[1:]...)
			stranger(cmd)
			if r := finish(t, n.Host, cmd, 10*time.Second); r.code == 0 && r.stdout != "403" {
				t.Errorf("another user gets %s", r.stdout)
			}
		}
		expectListeners(t, n, "after refusals")
	})
}

// stranger has cmd run as a user who is neither root nor ordinaryUser.
func stranger(cmd *exec.Cmd) {
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: ordinaryUser + 1, Gid: ordinaryUser + 1}}
}

// hammered is what came of many calls.
type hammered struct {
	Status  map[int]int   // HTTP status, 0 for none, and how often
	Info    time.Duration // as many of the simplest calls, the measure of the machine
	Add     time.Duration
	Remove  time.Duration
	Problem string // the first error without a status
}

// hammer is the process of roleHammer. Arguments: the socket, how many ports, how many
// calls at a time, and whether to remove them again. Ports are asked for from 20000 on.
func hammer() int {
	var path string
	var count, atOnce int
	var remove bool
	if _, err := fmt.Sscan(strings.Join(os.Args[1:], " "), &path, &count, &atOnce, &remove); err != nil {
		fmt.Fprintln(os.Stderr, "hammer:", err)
		return 1
	}
	raiseFileLimit()
	h := &hammerClient{out: hammered{Status: map[int]int{}}, http: &http.Client{
		Transport: &http.Transport{
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "unix", path)
			},
			MaxIdleConnsPerHost: atOnce,
		},
		Timeout: 60 * time.Second,
	}}
	ids := make([]uint64, count)
	begin := time.Now()
	if remove {
		h.each(count, atOnce, func(int) { h.try("GET", "/v1/info", "", nil) })
		h.out.Info = time.Since(begin)
		begin = time.Now()
	}
	h.each(count, atOnce, func(i int) { ids[i] = h.post(20000 + i) })
	h.out.Add = time.Since(begin)
	if remove {
		begin = time.Now()
		h.each(count, atOnce, func(i int) { h.call("DELETE", fmt.Sprintf("/v1/ports/%d", ids[i]), "", nil) })
		h.out.Remove = time.Since(begin)
	}
	json.NewEncoder(os.Stdout).Encode(h.out)
	return 0
}

// hammerClient counts answers.
type hammerClient struct {
	http *http.Client
	mu   sync.Mutex
	out  hammered // guarded by mu
}

// each calls f for 0 to count-1, some at a time.
func (h *hammerClient) each(count, atOnce int, f func(int)) {
	var wg sync.WaitGroup
	next := make(chan int)
	for range atOnce {
		wg.Go(func() {
			for i := range next {
				f(i)
			}
		})
	}
	for i := range count {
		next <- i
	}
	close(next)
	wg.Wait()
}

func (h *hammerClient) post(port int) uint64 {
	var p portDoc
	h.call("POST", "/v1/ports", fmt.Sprintf(`{"proto":"tcp","parentIP":"127.0.0.1","parentPort":%d,"childPort":81}`, port%65536), &p)
	return p.ID
}

func (h *hammerClient) call(method, path, body string, into any) {
	status, err := h.try(method, path, body, into)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.out.Status[status]++
	if err != nil && h.out.Problem == "" {
		h.out.Problem = err.Error()
	}
}

func (h *hammerClient) try(method, path, body string, into any) (status int, err error) {
	req, err := http.NewRequest(method, "http://rootlesskit"+path, strings.NewReader(body))
	if err != nil {
		return 0, err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := h.http.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if into != nil {
		json.Unmarshal(text, into)
	}
	return resp.StatusCode, err
}

// hammer runs that process.
func (e *engine) hammer(t testing.TB, count, atOnce int, remove bool) (h hammered) {
	t.Helper()
	cmd := exec.Command(helperPath, e.sock("api.sock"), fmt.Sprint(count), fmt.Sprint(atOnce), fmt.Sprint(remove))
	e.dress(cmd)
	cmd.Env = append(cmd.Env, envInner+"="+roleHammer)
	r := finish(t, e.net.Host, cmd, 120*time.Second)
	if err := json.Unmarshal([]byte(r.stdout), &h); err != nil {
		t.Fatalf("hammer: %v: %s%s", err, r.stdout, r.stderr)
	}
	return h
}

// TestPublishThousand: a thousand ports come and go in less than 3 s and leave nothing. A
// machine that is too busy for any such thing shows in how long other calls take.
func TestPublishThousand(t *testing.T) {
	needPublish(t)
	const count, within, tries, calls = 1000, 3 * time.Second, 4, 15
	eachUser(t, func(t *testing.T, n *topo.Topology, u user) {
		e := startEngine(t, n, engineOptions{user: u})
		start := settled(t, e, nil)
		var took, limit time.Duration
		for range tries {
			h := e.hammer(t, count, 1, true)
			if h.Status[http.StatusCreated] != count || h.Status[http.StatusOK]+h.Status[http.StatusNoContent] != count {
				t.Fatalf("answers %v, %s", h.Status, h.Problem)
			}
			t.Logf("%d ports: published in %v, withdrawn in %v; other calls took %v", count, h.Add, h.Remove, h.Info)
			if took, limit = h.Add+h.Remove, max(within, calls*h.Info); took < limit {
				break
			}
		}
		if took >= limit {
			t.Errorf("%d ports took %v at last, expected less than %v", count, took, limit)
		}
		expectListeners(t, n, "afterwards")
		settled(t, e, &start)
	})
}

// TestPublishManyCalls: thousands of calls at once and clients that do not read do no
// harm to others.
func TestPublishManyCalls(t *testing.T) {
	needPublish(t)
	n := newTopology(t)
	e := startEngine(t, n, engineOptions{noCapture: true})
	e.publish(t, "18080-18579:81-580")
	start := settled(t, e, nil)
	deaf := e.deafClients(t, 20)
	h := e.hammer(t, 10000, 2000, true)
	t.Logf("other calls took %v", h.Info)
	var answered int
	for status, n := range h.Status {
		switch status {
		case http.StatusCreated, http.StatusOK, http.StatusNoContent, http.StatusServiceUnavailable, http.StatusNotFound, http.StatusConflict, http.StatusTooManyRequests:
			answered += n
		}
	}
	if answered != 20000 {
		t.Errorf("answers %v, %s", h.Status, h.Problem)
	}
	t.Logf("answers %v, published in %v, withdrawn in %v", h.Status, h.Add, h.Remove)
	if all := readPorts(t, e); len(all) != 500 {
		t.Errorf("%d ports are left", len(all))
	}
	deaf()
	settled(t, e, &start)
}

// deafClients ask for long listings, again and again, and read nothing.
func (e *engine) deafClients(t testing.TB, count int) (end func()) {
	t.Helper()
	script := `for i in $(seq "$1"); do
		{ while printf 'GET /v1/ports HTTP/1.1\r\nHost: rootlesskit\r\n\r\n'; do :; done; } 2>/dev/null | ` +
		envInner + `=` + roleLease + ` ` + helperPath + ` "$2" deaf & done; echo ready; wait`
	cmd := exec.Command(lookPath(t, "bash"), "-c", script, "bash", fmt.Sprint(count), e.sock("api.sock"))
	e.dress(cmd)
	cmd.SysProcAttr = withGroup(cmd.SysProcAttr)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := e.net.Host.Start(cmd); err != nil {
		t.Fatal(err)
	}
	stop := sync.OnceFunc(func() {
		unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
		cmd.Wait()
	})
	t.Cleanup(stop)
	expectLine(t, bufio.NewReader(out), "ready")
	return stop
}

// lease is the process of roleLease: it joins the unix socket of its first argument with
// standard input and output. With a second argument nothing is read from the socket.
func lease() int {
	c, err := net.Dial("unix", os.Args[1])
	if err != nil {
		fmt.Fprintln(os.Stderr, "lease:", err)
		return 1
	}
	if len(os.Args) > 2 {
		if _, err := io.Copy(c, os.Stdin); err != nil {
			return 0 // the other end had enough
		}
		select {}
	}
	go func() {
		io.Copy(os.Stdout, c)
		os.Stdout.Close()
	}()
	io.Copy(c, os.Stdin)
	return 0
}

// TestPublishLimit: at the limit each further port is refused, at once, and there is room
// again for what is withdrawn.
func TestPublishLimit(t *testing.T) {
	needPublish(t, "prlimit")
	const files, asked = 400, 20000 // a quarter of the files is for ports
	script := fmt.Sprintf("#!/bin/sh\nexec prlimit --nofile=%[1]d:%[1]d %[2]s \"$@\"\n", files, os.Getenv(envBin))
	bin := filepath.Join(runTmp, "slipway-few-files")
	if err := os.WriteFile(bin, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(bin) }) // after the engine's end
	t.Setenv(envBin, bin)
	n := newTopology(t)
	e := startEngine(t, n, engineOptions{user: user{rootless: true}})
	if have := fileLimit(t, e.cmd.Process.Pid); have != files {
		missing(t, "a user who may not raise a limit: it is %d", have)
	}
	h := e.hammer(t, asked, 4, false)
	made, over := h.Status[http.StatusCreated], h.Status[http.StatusServiceUnavailable]
	if made < files/8 || made > files/4 || made+over != asked {
		t.Errorf("answers %v, %s", h.Status, h.Problem)
	}
	t.Logf("%d ports, and %d refusals in %v", made, over, h.Add)
	r := e.call(t, "ports", "add", e.name, "127.0.0.1:1024-65535:1024-65535")
	if r.code != 125 || badMessage(r.stderr) != "" {
		t.Errorf("a range: status %d: %s", r.code, tail(r.stderr, 1000))
	}
	all := readPorts(t, e)
	e.withdraw(t, fmt.Sprint(all[0].ID))
	e.publish(t, "127.0.0.1:18080:81")
	tellSource(t, e.guest, enginePort)
	reach(t, n, "tcp", 18080)
}

// guestLease is a connection to guest.sock.
type guestLease struct {
	in  io.WriteCloser
	out *bufio.Reader
	cmd *exec.Cmd
}

// lease connects from inside the engine; before is a command that runs the rest.
func (e *engine) lease(t testing.TB, before ...string) *guestLease {
	t.Helper()
	script := "exec env " + envInner + "=" + roleLease + ` "$@" ` + helperPath + ` "$SLIPWAY_SOCK"`
	l := &guestLease{cmd: e.slipway(append([]string{"exec", e.name, "--", "sh", "-c", script, "sh"}, before...)...)}
	out, err := l.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if l.in, err = l.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	l.cmd.Stderr = &e.stderr
	if err := e.net.Host.Start(l.cmd); err != nil {
		t.Fatal(err)
	}
	l.out = bufio.NewReader(out)
	t.Cleanup(func() { l.end() })
	return l
}

func (l *guestLease) end() {
	if l.cmd.ProcessState == nil {
		l.in.Close()
		timer := time.AfterFunc(10*time.Second, func() { l.cmd.Process.Kill() })
		l.cmd.Wait()
		timer.Stop()
	}
}

// leaseAnswer is a line of guest.sock.
type leaseAnswer struct {
	Port        *portDoc
	Error, Hint string
}

// say sends a line and reads the answer; ok is false when the connection has ended.
func (l *guestLease) say(t testing.TB, line string) (a leaseAnswer, ok bool) {
	t.Helper()
	io.WriteString(l.in, line+"\n")
	return l.hear(t)
}

func (l *guestLease) hear(t testing.TB) (a leaseAnswer, ok bool) {
	t.Helper()
	got := make(chan []byte, 1)
	go func() {
		line, _ := l.out.ReadBytes('\n')
		got <- line
	}()
	line := receive(t, got)
	if len(line) == 0 {
		return a, false
	}
	if err := json.Unmarshal(line, &a); err != nil {
		t.Errorf("guest.sock says %q: %v", line, err)
	}
	return a, true
}

// TestPublishGuestSock: what is inside publishes its own ports, for as long as its
// connection lasts; who is in another namespace does not.
func TestPublishGuestSock(t *testing.T) {
	needPublish(t)
	eachUser(t, func(t *testing.T, n *topo.Topology, u user) {
		e := startEngine(t, n, engineOptions{user: u})
		tellSource(t, e.guest, enginePort)
		a := e.lease(t)
		first, ok := a.say(t, `{"publish":{"proto":"tcp","parentPort":18080,"childPort":81}}`)
		if !ok || first.Port == nil || first.Port.Spec.ParentPort != 18080 {
			t.Fatalf("guest.sock: %+v", first)
		}
		if s, _ := a.say(t, `{"publish":{"proto":"udp","parentPort":18080,"childPort":81}}`); s.Port == nil {
			t.Errorf("a second port: %+v", s)
		}
		expectListeners(t, n, "published from inside", onAll("tcp", 18080), onAll("udp", 18080))
		reach(t, n, "tcp", 18080)

		b := e.lease(t)
		if s, _ := b.say(t, `{"publish":{"proto":"tcp","parentPort":18080,"childPort":82}}`); s.Port != nil || !strings.Contains(s.Error, "18080") {
			t.Errorf("another's port: %+v", s)
		}
		if s, _ := b.say(t, fmt.Sprintf(`{"withdraw":%d}`, first.Port.ID)); s.Error == "" {
			t.Errorf("another's port was withdrawn: %+v", s)
		}
		for _, line := range []string{`{}`, `{"publish":7}`, `[]`, `nonsense`, ``, `{"publish":{"proto":"sctp","parentPort":18081,"childPort":81}}`, `{"publish":{"proto":"tcp","parentPort":18081,"childIP":"10.9.8.7","childPort":81}}`} {
			c := e.lease(t)
			if s, ok := c.say(t, line); ok && s.Error == "" {
				t.Errorf("guest.sock to %q: %+v", line, s)
			}
			c.end()
		}
		long := e.lease(t)
		if s, ok := long.say(t, strings.Repeat("x", 1<<20)); ok && s.Error == "" {
			t.Errorf("guest.sock to a long line: %+v", s)
		}
		expectListeners(t, n, "after mistakes", onAll("tcp", 18080), onAll("udp", 18080))

		if s, _ := a.say(t, fmt.Sprintf(`{"withdraw":%d}`, first.Port.ID)); s.Error != "" {
			t.Errorf("withdraw: %+v", s)
		}
		expectListeners(t, n, "withdrawn", onAll("udp", 18080))
		a.end()
		expectListeners(t, n, "after the connection")

		stranger := e.lease(t, "unshare", "--net")
		if s, ok := stranger.say(t, `{"publish":{"proto":"tcp","parentPort":18082,"childPort":81}}`); ok && s.Error == "" {
			t.Errorf("from another namespace: %+v", s)
		}
		expectListeners(t, n, "asked for from another namespace")
	})
}

// withGroup has a command lead a process group, so that all of it can be ended.
func withGroup(a *syscall.SysProcAttr) *syscall.SysProcAttr {
	if a == nil {
		a = new(syscall.SysProcAttr)
	}
	a.Setpgid = true
	return a
}
