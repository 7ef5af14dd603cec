package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/slipway-net/slipway/forward/publish"
	"github.com/slipway-net/slipway/internal/api"
	"github.com/slipway-net/slipway/internal/config"
	"github.com/slipway-net/slipway/internal/engine/docker"
	"github.com/slipway-net/slipway/internal/flow"
	"github.com/slipway-net/slipway/internal/nsagent"
)

// noCarrier carries nobody.
type noCarrier struct{}

func (noCarrier) ServeTCP(*net.TCPListener, *publish.Port) (io.Closer, error) {
	return io.NopCloser(nil), nil
}

func (noCarrier) ServeUDP(*net.UDPConn, *publish.Port) (io.Closer, error) {
	return io.NopCloser(nil), nil
}

// bookEngine is an engine called "web" that has nothing but a state directory and a book.
func bookEngine(t *testing.T) *engine {
	t.Helper()
	e, _ := testEngine(t, Options{Name: "web", Config: config.Default()})
	var err error
	if e.state, err = openState(filepath.Join(t.TempDir(), "slipway"), "web"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.state.Close() })
	e.book = publish.New(publish.Config{Carrier: noCarrier{}})
	t.Cleanup(e.book.Close)
	return e
}

func portSpecs(t *testing.T, words ...string) (all []flow.PortSpec) {
	t.Helper()
	for _, w := range words {
		specs, err := flow.ParsePorts(w)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, specs...)
	}
	return all
}

// untilFound calls publish, which fails, until the search for who has the port was not given up, as it
// is on a busy machine.
func untilFound(publish func() error) (err error) {
	for range 10 {
		if err = publish(); err == nil || !strings.HasSuffix(err.Error(), "a process of root") && !strings.Contains(err.Error(), "a process of uid") {
			break
		}
		time.Sleep(1100 * time.Millisecond) // what was seen is good for a second
	}
	return err
}

// A port of the command line that cannot be published is an error with a hint, and a
// holder that is an engine is named as one.
func TestPublishConfiguredTells(t *testing.T) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	for name, whose := range map[string]string{"db": "engine db", "web": "this engine"} {
		e := bookEngine(t)
		state := e.state
		if name != "web" {
			if state, err = openState(e.state.root, name); err != nil {
				t.Fatal(err)
			}
			defer state.Close()
		}
		state.write("pid", fmt.Appendf(nil, "%d\n", os.Getpid()))
		e.cfg.Publish = portSpecs(t, ln.Addr().String()+":80")
		err := untilFound(func() error { return e.publishConfigured(t.Context()) })
		var p *Problem
		if want := fmt.Sprintf("is taken by %s (pid %d)", whose, os.Getpid()); !errors.As(err, &p) || !strings.HasSuffix(err.Error(), want) {
			t.Fatalf("error %v, expected %q", err, want)
		}
		if p.Hint == "" || strings.Contains(p.Hint, "stop") || strings.Contains(p.Hint, "slipway ports ls db") != (name == "db") {
			t.Errorf("hint %q", p.Hint)
		}
	}
}

// What an engine has published itself is told by who asked for it.
func TestToldOwner(t *testing.T) {
	e := bookEngine(t)
	guest := fmt.Sprintf("guest:%d/3", os.Getpid())
	for owner, want := range map[string]string{
		ownerConfig: "of the configuration or -p", "api": "of slipway ports add or the API", ownerDocker: "by docker_api", ownerAuto: "of publish_auto",
		guest: fmt.Sprintf("(pid %d) in the engine", os.Getpid()), "guest:x/../../1": "of a process in the engine",
	} {
		p, err := e.book.Add(owner, portSpecs(t, "127.0.0.1:0:80")[0])
		if err != nil {
			t.Fatal(err)
		}
		_, err = backend{e}.AddPort(t.Context(), "other", portSpecs(t, p.Listens[0].String()+":81")[0])
		if err == nil || !strings.HasSuffix(err.Error(), want) {
			t.Errorf("%s: %v, expected %q", owner, err, want)
		}
	}
}

// Who asks for a port that is there in another way hears in which.
func TestToldHowItDiffers(t *testing.T) {
	e := bookEngine(t)
	s := portSpecs(t, "127.0.0.1:0:80")[0]
	s.Source = flow.SourceGateway
	p, err := e.book.Add(api.OwnerAPI, s)
	if err != nil {
		t.Fatal(err)
	}
	const want = "of slipway ports add or the API, with the source_ip gateway"
	_, err = backend{e}.AddPort(t.Context(), api.OwnerAPI, portSpecs(t, p.Listens[0].String()+":80")[0])
	if err == nil || !strings.HasSuffix(err.Error(), want) {
		t.Errorf("%v, expected %q", err, want)
	}
}

// What is not about a port's holder stays as it is, and so does a stranger.
func TestToldOthers(t *testing.T) {
	e := bookEngine(t)
	for _, err := range []error{
		errors.New("x"), &publish.ConflictError{}, &publish.ConflictError{Holder: publish.User{UID: 7}},
		&publish.ConflictError{Holder: publish.Process{Name: "nginx", PID: 812}}, &publish.PolicyError{},
	} {
		if got := e.told(t.Context(), api.OwnerAPI, err); got != err {
			t.Errorf("%v became %v", err, got)
		}
	}
	const want = "is taken by a connection of a slipway engine (pid 1)"
	if err := e.told(t.Context(), api.OwnerAPI, &publish.ConflictError{Holder: publish.Process{Name: "slipway", PID: 1, Connection: true}}); !strings.HasSuffix(err.Error(), want) {
		t.Errorf("%v, expected %q", err, want)
	}
}

// dockerAPI has an engine's Docker API tell of one container.
func dockerAPI(t *testing.T, e *engine) {
	t.Helper()
	ln, err := net.Listen("unix", filepath.Join(e.state.path, "docker.sock"))
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, `[{"Names": ["/shop"], "Ports": [{"PrivatePort": 80, "PublicPort": 7, "Type": "tcp"}], "NetworkSettings": {"Networks": {"bridge": {"IPAddress": "172.17.0.2"}}}}]`)
	}))
	srv.Listener.Close()
	srv.Listener = ln
	srv.Start()
	t.Cleanup(srv.Close)
	e.names = docker.NewNames(ln.Addr().String(), e.log)
	t.Cleanup(e.names.Close)
}

// A port that a container has is told by the container's name, by its own engine and by others.
func TestToldContainer(t *testing.T) {
	shop, other := bookEngine(t), bookEngine(t)
	dockerAPI(t, shop)
	shop.doors, other.doors = &doors{engine: shop}, &doors{engine: other}
	s := portSpecs(t, "127.0.0.1:0:80")[0]
	s.Behind = netip.MustParseAddrPort("172.17.0.2:80")
	p, err := shop.book.Add("guest:1/1", s)
	if err != nil {
		t.Fatal(err)
	}
	again := portSpecs(t, p.Listens[0].String()+":81")[0]
	const want = "is taken by container shop of engine web"
	if _, err := (backend{shop}).AddPort(t.Context(), api.OwnerAPI, again); err == nil || !strings.HasSuffix(err.Error(), want) {
		t.Errorf("its own engine: %v, expected %q", err, want)
	}

	if _, err := (backend{shop}).AddPort(t.Context(), "guest:1/2", again); err == nil || !strings.HasSuffix(err.Error(), "in the engine") {
		t.Errorf("another lease: %v", err)
	}

	listed := backend{shop}.Ports(t.Context())
	if len(listed) != 1 || listed[0].Container != "shop" || listed[0].Program != "" || listed[0].Reaches != s.Behind {
		t.Errorf("listed as %+v", listed)
	}

	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(shop.state.path, socketName), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	serving, stop := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- api.NewServer(backend{shop}, nil).Serve(serving, ln) }()
	defer func() { stop(); <-served }()
	shop.state.write("pid", fmt.Appendf(nil, "%d\n", os.Getpid()))
	other.opts.Name, other.state = "other", shop.state
	err = untilFound(func() error {
		_, err := backend{other}.AddPort(t.Context(), api.OwnerAPI, again)
		return err
	})
	var told *api.Error
	if !errors.As(err, &told) || told.Status != http.StatusConflict || !strings.HasSuffix(err.Error(), want) || !strings.Contains(told.Hint, "stop that container") {
		t.Errorf("another engine: %v, expected %q", err, want)
	}
}

// What could not be published of a list is a warning in the status until it could.
func TestUnpublished(t *testing.T) {
	e := bookEngine(t)
	p, err := e.book.Add("other", portSpecs(t, "127.0.0.1:0:80")[0])
	if err != nil {
		t.Fatal(err)
	}
	taken := p.Listens[0].String()
	r := e.reconciler(t.Context(), ownerDocker)
	var specs []flow.PortSpec
	for i := range maxUnpublished + 3 {
		specs = append(specs, portSpecs(t, fmt.Sprintf("%s:%d", taken, i+1))...)
	}
	r.apply(specs)
	got := e.statusWarnings(nsagent.Report{})
	if len(got) != maxUnpublished+1 || !strings.HasPrefix(got[0], "port of docker not published: publish "+taken+"/tcp: port ") || got[maxUnpublished] != "3 more ports of docker not published" {
		t.Errorf("warnings %q", got)
	}
	e.book.RemoveOwner("other")
	r.apply(specs[:1])
	if got := e.statusWarnings(nsagent.Report{}); len(got) != 0 {
		t.Errorf("warnings %q after it was published", got)
	}
}

// A neighbour that does not answer is waited for once.
func TestToldStalledNeighbour(t *testing.T) {
	e := bookEngine(t)
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(e.state.path, socketName), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	var n neighbours
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if n.container(gone, e.state.root, "web", flow.PortSpec{}); len(n.said) != 0 {
		t.Error("somebody who does not want to know any more says something about the engine")
	}
	from := time.Now()
	for range 200 {
		if got := n.container(t.Context(), e.state.root, "web", flow.PortSpec{}); got != "" {
			t.Fatal(got)
		}
	}
	if d := time.Since(from); d < neighbourLimit || d > 50*neighbourLimit {
		t.Errorf("took %v", d)
	}
}
