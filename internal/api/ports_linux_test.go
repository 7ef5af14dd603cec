package api

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/slipway-net/slipway/internal/flow"
)

// book is a PortBackend that opens nothing: a port is taken when it has the same
// protocol, address and number as another.
type book struct {
	mu     sync.Mutex // guards the fields below
	ports  map[uint64]Port
	taken  map[place]uint64
	last   uint64
	broken error // of every AddPort
}

// place is where a port listens.
type place struct {
	proto flow.Proto
	host  netip.AddrPort
}

// breaks has every AddPort fail from now on.
func (b *book) breaks(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.broken = err
}

func (b *book) Ports(context.Context) []Port {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.SortedFunc(maps.Values(b.ports), func(p, q Port) int { return cmp.Compare(p.ID, q.ID) })
}

func (b *book) AddPort(_ context.Context, owner string, s flow.PortSpec) (Port, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.broken != nil {
		return Port{}, b.broken
	}
	if p, ok := b.ports[b.taken[place{s.Proto, s.Host}]]; ok {
		if p.Owner != owner || p.Spec != SpecOf(s) {
			return Port{}, &Error{Message: fmt.Sprintf("publish %v: taken by %s", s, p.Owner), Status: http.StatusConflict}
		}
		return p, nil
	}
	b.last++
	if s.Host.Port() == 0 {
		s.Host = netip.AddrPortFrom(s.Host.Addr(), uint16(32768+b.last))
	}
	p := Port{ID: b.last, Spec: SpecOf(s), Owner: owner, Since: time.Now(), Listens: []netip.AddrPort{s.Host}}
	if b.ports == nil {
		b.ports, b.taken = map[uint64]Port{}, map[place]uint64{}
	}
	b.ports[p.ID], b.taken[place{s.Proto, s.Host}] = p, p.ID
	return p, nil
}

func (b *book) RemovePort(id uint64) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, ok := b.ports[id]; !ok {
		return &Error{Message: fmt.Sprintf("withdraw port %d: there is none", id), Status: http.StatusNotFound}
	}
	delete(b.ports, id)
	return nil
}

// spec is a flow.PortSpec in the notation of the command line.
func spec(t *testing.T, s string) flow.PortSpec {
	t.Helper()
	list, err := flow.ParsePorts(s)
	if err != nil || len(list) != 1 {
		t.Fatalf("%s: %v", s, err)
	}
	return list[0]
}

func TestPorts(t *testing.T) {
	c := client(t, serve(t, new(fake)))
	if l, err := c.Ports(t.Context()); err != nil || l == nil || len(l) != 0 {
		t.Errorf("Ports = %v, %v", l, err)
	}
	want := spec(t, "127.0.0.1:0:80")
	want.Behind, want.Source, want.ProxyProtocol = netip.MustParseAddrPort("172.17.0.2:8080"), flow.SourceGateway, true
	p, err := c.AddPort(t.Context(), want)
	if err != nil || p.ID != 1 || p.Owner != OwnerAPI || p.Since.IsZero() {
		t.Fatalf("AddPort = %+v, %v", p, err)
	}
	want.Host = netip.MustParseAddrPort("127.0.0.1:32769")
	if got, err := p.Spec.Flow(); err != nil || got != want {
		t.Errorf("published %+v, %v; want %+v", got, err, want)
	}
	if l, err := c.Ports(t.Context()); err != nil || len(l) != 1 || l[0].Spec != p.Spec || !slices.Equal(l[0].Listens, p.Listens) {
		t.Errorf("Ports = %+v, %v", l, err)
	}
	if err := c.RemovePort(t.Context(), 1); err != nil {
		t.Errorf("RemovePort = %v", err)
	}
	if e := asError(c.RemovePort(t.Context(), 1)); e.Status != http.StatusNotFound || e.Message != "withdraw port 1: there is none" {
		t.Errorf("RemovePort again = %+v", e)
	}
}

func TestInfo(t *testing.T) {
	i, err := client(t, serve(t, new(fake))).Info(t.Context())
	if err != nil || i.PortDriver.Driver != "slipway" || !slices.Contains(i.PortDriver.Protos, "udp6") || i.APIVersion != "1.1.2" {
		t.Errorf("Info = %+v, %v", i, err)
	}
}

// post sends a body as a RootlessKit client does and returns the answer.
func post(t *testing.T, path, body string) (status int, answer string) {
	t.Helper()
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return dialUnix(ctx, path)
	}}
	defer tr.CloseIdleConnections()
	r, err := http.NewRequest("POST", "http://rootlesskit/v1/ports", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/json")
	resp, err := tr.RoundTrip(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

func TestPortErrors(t *testing.T) {
	b := new(fake)
	path := serve(t, b)
	const body = `{"proto":"tcp4","parentIP":"0.0.0.0","parentPort":80,"childIP":"127.0.0.1","childPort":80}`
	if status, answer := post(t, path, body); status != http.StatusCreated || !strings.HasPrefix(answer, `{"id":1,"spec":{"proto":"tcp",`) {
		t.Errorf("answer %d %s", status, answer)
	}
	if status, answer := post(t, path, body); status != http.StatusCreated || !strings.HasPrefix(answer, `{"id":1,`) {
		t.Errorf("asked again: %d %s", status, answer)
	}
	for refuse, want := range map[error]int{
		&Error{Message: "publish 192.0.2.9:80/tcp: not ours", Hint: "look", Status: 400}: 400,
		&Error{Message: "publish 80: taken", Status: 409}:                                409,
		&Error{Message: "publish 80: too many", Status: 503}:                             503,
		errors.New("publish 80: broken"):                                                 500,
	} {
		b.breaks(refuse)
		status, answer := post(t, path, body)
		var e struct{ Error, Message, Hint string }
		if err := json.Unmarshal([]byte(answer), &e); err != nil || status != want || e.Error != refuse.Error() {
			t.Errorf("%v: answer %d %s", refuse, status, answer)
		}
		text := e.Error
		if e.Hint != "" {
			text += "; hint: " + e.Hint
		}
		if e.Message != text { // what RootlessKit's clients show
			t.Errorf("message %q, want %q", e.Message, text)
		}
	}
	for body := range badSpecs {
		if status, answer := post(t, path, body); status != http.StatusBadRequest || strings.Count(answer, "\n") != 1 {
			t.Errorf("%.100s: answer %d %s", body, status, answer)
		}
	}
	if status, answer := post(t, path, `{"proto":"`+strings.Repeat("x", maxSpec)+`"}`); status != http.StatusRequestEntityTooLarge {
		t.Errorf("too long: answer %d %s", status, answer)
	}
	if n := len(b.Ports(t.Context())); n != 1 {
		t.Errorf("%d ports are published, want 1", n)
	}
}

// rootlessctl runs RootlessKit's own command line.
func rootlessctl(t *testing.T, path string, args ...string) (string, error) {
	t.Helper()
	out, err := exec.Command("rootlessctl", append([]string{"--socket", path}, args...)...).CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

func TestRootlessctl(t *testing.T) {
	if _, err := exec.LookPath("rootlessctl"); err != nil {
		missing(t, err)
	}
	path := serve(t, new(fake))
	if out, err := rootlessctl(t, path, "add-ports", "127.0.0.1:8080:80/tcp", "0.0.0.0:5353:10.0.2.100:53/udp"); err != nil || out != "1\n2" {
		t.Fatalf("add-ports = %q, %v", out, err)
	}
	out, err := rootlessctl(t, path, "list-ports", "--json")
	for _, want := range []string{
		`{"id":1,"spec":{"proto":"tcp","parentIP":"127.0.0.1","parentPort":8080,"childPort":80}}`,
		`{"id":2,"spec":{"proto":"udp","parentIP":"0.0.0.0","parentPort":5353,"childPort":53,"childIP":"10.0.2.100"}}`,
	} {
		if err != nil || !strings.Contains(out, want) {
			t.Errorf("list-ports = %s, %v; want %s", out, err, want)
		}
	}
	if out, err := rootlessctl(t, path, "add-ports", "127.0.0.1:8080:81/tcp"); err == nil || !strings.Contains(out, "tcp: taken by api") {
		t.Errorf("conflict = %q, %v", out, err)
	}
	if out, err := rootlessctl(t, path, "remove-ports", "1", "2"); err != nil {
		t.Errorf("remove-ports = %q, %v", out, err)
	}
	if out, err := rootlessctl(t, path, "remove-ports", "1"); err == nil || !strings.Contains(out, "there is none") {
		t.Errorf("remove-ports again = %q, %v", out, err)
	}
	if out, err := rootlessctl(t, path, "info", "--json"); err != nil || !strings.Contains(out, `"driver": "slipway"`) {
		t.Errorf("info = %q, %v", out, err)
	}
}

// Ten thousand ask at the same moment: each gets its own port.
func TestTenThousandCalls(t *testing.T) {
	const calls = 10_000
	if fileLimit() < 2*calls {
		missing(t, fmt.Errorf("%d open files are not enough", fileLimit()))
	}
	b := new(fake)
	c := client(t, serve(t, b))
	before := openFiles(t)
	errs := make(chan error, calls)
	for i := range calls {
		go func() {
			s := flow.PortSpec{Proto: flow.TCP, Host: netip.AddrPortFrom(netip.Addr{}, uint16(i+1))}
			p, err := c.AddPort(t.Context(), s)
			if err == nil && p.Spec.ParentPort != i+1 {
				err = fmt.Errorf("asked for %d, got %+v", i+1, p)
			}
			if err == nil && i%2 == 0 {
				err = c.RemovePort(t.Context(), p.ID)
			}
			errs <- err
		}()
	}
	for range calls {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if n := len(b.Ports(t.Context())); n != calls/2 {
		t.Errorf("%d ports are left, want %d", n, calls/2)
	}
	for deadline := time.Now().Add(30 * time.Second); openFiles(t) > before; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d files are open, %d were before", openFiles(t), before)
		}
	}
}

// Clients that ask for a long list and do not read it keep nobody out: neither while
// there are turns left, nor for longer than writeTimeout when there are none.
func TestClientStopsReading(t *testing.T) {
	b := &fake{book: book{ports: map[uint64]Port{}}}
	for id := range uint64(500) { // more than a socket's buffer holds
		b.ports[id] = Port{ID: id, Owner: strings.Repeat("x", 1000)}
	}
	const patience = 2 * time.Second
	answered := func(ask func() error) (err error) {
		for range 5 { // on a busy machine one may not be sent within it, but not all
			if err = ask(); err == nil {
				break
			}
		}
		return err
	}
	path := serveWith(t, b, func(s *Server) { s.http.WriteTimeout = patience })
	stall := func(n int) {
		for range n {
			c, err := dialUnix(t.Context(), path)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
			fmt.Fprintf(c, "GET /v1/ports HTTP/1.1\r\nHost: %s\r\n\r\n", Host)
			c.Read(make([]byte, 1)) // it is being answered
		}
	}
	stall(10)
	c := client(t, path)
	var l []Port
	if err := answered(func() (err error) { l, err = c.Ports(t.Context()); return err }); err != nil || len(l) != len(b.ports) {
		t.Fatalf("%d ports, %v", len(l), err)
	}
	stall(maxConns + 10) // returns only because the earlier ones are cut off
	if err := answered(func() error { _, err := c.Status(t.Context()); return err }); err != nil {
		t.Error(err)
	}
}
