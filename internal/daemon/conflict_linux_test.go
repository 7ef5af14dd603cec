package daemon

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/slipway-net/slipway/forward/publish"
	"github.com/slipway-net/slipway/internal/config"
	"github.com/slipway-net/slipway/internal/flow"
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
		err := e.publishConfigured()
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

// What is not about a port's holder stays as it is, and so does a stranger.
func TestToldOthers(t *testing.T) {
	e := bookEngine(t)
	for _, err := range []error{
		errors.New("x"), &publish.ConflictError{}, &publish.ConflictError{Holder: publish.User{UID: 7}},
		&publish.ConflictError{Holder: publish.Process{Name: "nginx", PID: 812}}, &publish.PolicyError{},
	} {
		if got := e.told(err); got != err {
			t.Errorf("%v became %v", err, got)
		}
	}
	const want = "is taken by a connection of a slipway engine (pid 1)"
	if err := e.told(&publish.ConflictError{Holder: publish.Process{Name: "slipway", PID: 1, Connection: true}}); !strings.HasSuffix(err.Error(), want) {
		t.Errorf("%v, expected %q", err, want)
	}
}
