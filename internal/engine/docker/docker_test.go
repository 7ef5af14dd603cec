package docker

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/slipway-net/slipway/internal/flow"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// engine is an engine's API. A test changes what it answers.
type engine struct {
	socket string

	mu       sync.Mutex // guards the fields below
	answers  map[string]answer
	asked    map[string]int
	watchers map[chan string]bool // who reads events
	server   *http.Server
	served   sync.WaitGroup
}

type answer struct {
	status int // 0 is 200
	body   string
	header string // its name
}

func newEngine(t *testing.T) *engine {
	e := &engine{socket: filepath.Join(t.TempDir(), "docker.sock"), asked: map[string]int{}, watchers: map[chan string]bool{}}
	e.answers = map[string]answer{
		"/containers/json": {body: "[]"},
		"/services":        {http.StatusServiceUnavailable, `{"message":"This node is not a swarm manager. Use \"docker swarm init\""}`, ""},
	}
	t.Cleanup(e.stop)
	return e
}

func (e *engine) start(t *testing.T) {
	t.Helper()
	ln, err := net.Listen("unix", e.socket)
	if err != nil {
		t.Fatal(err)
	}
	e.server = &http.Server{Handler: e}
	e.served.Go(func() { e.server.Serve(ln) })
}

// stop ends all connections, as the end of the process does.
func (e *engine) stop() {
	if e.server != nil {
		e.server.Close()
		e.served.Wait()
		e.server = nil
	}
}

func (e *engine) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	e.mu.Lock()
	e.asked[r.URL.Path]++
	a, known := e.answers[r.URL.Path]
	e.mu.Unlock()
	if r.URL.Path == "/events" && !known {
		e.events(w, r)
		return
	}
	if !known {
		http.NotFound(w, r)
		return
	}
	if a.header != "" {
		w.Header().Set(a.header, "4.3.1")
	}
	w.WriteHeader(max(a.status, http.StatusOK))
	fmt.Fprint(w, a.body)
}

func (e *engine) events(w http.ResponseWriter, r *http.Request) {
	mine := make(chan string, 100)
	e.mu.Lock()
	e.watchers[mine] = true
	e.mu.Unlock()
	defer func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		delete(e.watchers, mine)
	}()
	w.WriteHeader(http.StatusOK)
	for {
		http.NewResponseController(w).Flush()
		select {
		case text := <-mine:
			fmt.Fprintln(w, text)
		case <-r.Context().Done():
			return
		}
	}
}

// says has the engine answer something else from now on, and tells of an event.
func (e *engine) says(path string, a answer, events ...string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.answers[path] = a
	for w := range e.watchers {
		for _, text := range events {
			w <- text
		}
	}
}

// runs has the engine run containers that publish these ports of all addresses.
func (e *engine) runs(ports ...int) answer {
	list := []map[string]any{}
	for _, p := range ports {
		list = append(list, map[string]any{"Id": fmt.Sprint("c", p), "Ports": []port{{"0.0.0.0", 80, p, "tcp"}}})
	}
	b, _ := json.Marshal(list)
	return answer{body: string(b)}
}

func (e *engine) count(path string) int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.asked[path]
}

// book is what a Watch has applied.
type book struct {
	mu    sync.Mutex
	ports []uint16
	calls int
	least int // the fewest ports since it was reset
}

func (b *book) apply(specs []flow.PortSpec) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.ports = nil
	for _, s := range specs {
		b.ports = append(b.ports, s.Host.Port())
	}
	b.calls++
	b.least = min(b.least, len(specs))
}

func (b *book) has(ports ...uint16) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.calls > 0 && slices.Equal(b.ports, ports)
}

// watch runs a Watch until the test ends.
func watch(t *testing.T, c Config) *book {
	b := &book{}
	c.Apply = b.apply
	ctx, cancel := context.WithCancel(context.Background())
	var done sync.WaitGroup
	done.Go(func() { Watch(ctx, c) })
	t.Cleanup(func() { cancel(); done.Wait() })
	return b
}

// eventually polls until ok, for at most a minute: what is missed on a busy machine comes with the
// next list that nobody asked for.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(time.Minute); !ok(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatalf("not within a minute: %s", what)
		}
	}
}

const (
	startEvent  = `{"Type":"container","Action":"start","Actor":{"ID":"c8080","Attributes":{"name":"web"}},"scope":"local"}`
	dieEvent    = `{"status":"die","id":"c8080","Type":"container","Action":"die"}`
	healthEvent = `{"Type":"container","Action":"health_status: healthy"}`
)

// TestWatch: containers come and go with their events.
func TestWatch(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.start(t)
	b := watch(t, Config{Socket: e.socket})
	eventually(t, "the first list", func() bool { return b.has() })
	e.says("/containers/json", e.runs(8080, 8081), startEvent)
	eventually(t, "two ports", func() bool { return b.has(8080, 8081) })
	e.says("/containers/json", e.runs(8081), dieEvent)
	eventually(t, "one port", func() bool { return b.has(8081) })
}

// TestLateList: an engine that tells of a death before it believes it itself.
func TestLateList(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.says("/containers/json", e.runs(8080))
	e.start(t)
	b := watch(t, Config{Socket: e.socket})
	eventually(t, "a port", func() bool { return b.has(8080) })
	before := e.count("/containers/json")
	e.says("/containers/json", e.runs(8080), dieEvent)
	eventually(t, "a list after the event", func() bool { return e.count("/containers/json") > before })
	e.says("/containers/json", e.runs())
	eventually(t, "no port", func() bool { return b.has() })
}

// TestBusyEngine: events that change nothing cost nothing, and a crowd of others costs a
// few lists.
func TestBusyEngine(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.start(t)
	b := watch(t, Config{Socket: e.socket})
	eventually(t, "the first list", func() bool { return b.has() })
	e.says("/containers/json", e.runs(8080), slices.Repeat([]string{healthEvent}, 50)...)
	e.says("/containers/json", e.runs(8080), slices.Repeat([]string{startEvent}, 50)...)
	eventually(t, "a port", func() bool { return b.has(8080) })
	eventually(t, "the last list of the crowd", func() bool { return e.count("/containers/json") >= 4 })
	if n := e.count("/containers/json"); n > 20 { // 4, and on a busy machine it is not one crowd
		t.Errorf("%d lists after 100 events", n)
	}
}

// TestEngineRestarts: a short absence changes nothing, a long one withdraws everything,
// and then it is back.
func TestEngineRestarts(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.says("/containers/json", e.runs(8080))
	b := watch(t, Config{Socket: e.socket}) // before the engine
	e.start(t)
	eventually(t, "a port", func() bool { return b.has(8080) })
	b.mu.Lock()
	b.least = 1
	b.mu.Unlock()
	e.stop()
	e.says("/containers/json", e.runs(8080, 8081))
	e.start(t)
	eventually(t, "two ports", func() bool { return b.has(8080, 8081) })
	if b.mu.Lock(); b.least != 1 {
		t.Error("ports were withdrawn while the engine was away for a moment")
	}
	b.mu.Unlock()
	gone := time.Now()
	e.stop()
	eventually(t, "nothing", func() bool { return b.has() })
	if d := time.Since(gone); d < grace {
		t.Errorf("withdrawn after %v", d)
	}
	e.start(t)
	eventually(t, "two ports again", func() bool { return b.has(8080, 8081) })
}

// TestNoEvents: an engine that keeps none is asked now and then, whether it says so or
// ends the stream at once.
func TestNoEvents(t *testing.T) {
	for name, a := range map[string]answer{
		"refused": {http.StatusInternalServerError, `{"cause":"no events","message":"cannot read events with the \"none\" backend"}`, ""},
		"ended":   {},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e := newEngine(t)
			e.says("/events", a)
			e.start(t)
			b := watch(t, Config{Socket: e.socket})
			eventually(t, "the first list", func() bool { return b.has() })
			e.says("/containers/json", e.runs(8080))
			eventually(t, "a port", func() bool { return b.has(8080) })
			if n := e.count("/containers/json"); n > 10 {
				t.Errorf("asked %d times in some seconds", n)
			}
		})
	}
}

// TestPodman: its list has one port of each range, its inspection all.
func TestPodman(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	list := e.runs(8060, 8070)
	list.header = "Libpod-Api-Version"
	e.says("/containers/json", list)
	e.says("/containers/c8060/json", answer{body: `{"NetworkSettings":{"Ports":{
		"80/tcp":[{"HostIp":"","HostPort":"8060"}],"81/tcp":[{"HostIp":"0.0.0.0","HostPort":"8061"}],"90/tcp":null}}}`})
	e.start(t) // c8070 is gone when it is asked for
	b := watch(t, Config{Socket: e.socket})
	eventually(t, "the ports of the inspection", func() bool { return b.has(8060, 8061) })
}

// TestSwarm: ingress ports come from the services, also when somebody else publishes for
// the containers.
func TestSwarm(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.says("/containers/json", e.runs(8080))
	services := answer{body: `[{"Endpoint":{"Ports":[{"Protocol":"tcp","PublishedPort":8070,"PublishMode":"ingress"}]}}]`}
	e.says("/services", services)
	e.start(t)
	b, only := watch(t, Config{Socket: e.socket}), watch(t, Config{Socket: e.socket, ServicesOnly: true})
	eventually(t, "both ports", func() bool { return b.has(8070, 8080) })
	eventually(t, "the service's", func() bool { return only.has(8070) })

	const event = `{"Type":"service","Action":"update","scope":"swarm"}`
	lists := e.count("/services")
	e.says("/services", answer{http.StatusServiceUnavailable, `{"message":"rpc error: the swarm does not have a leader"}`, ""}, event)
	eventually(t, "both have asked again", func() bool { return e.count("/services") >= lists+6 })
	if !b.has(8070, 8080) || !only.has(8070) {
		t.Error("a swarm without a leader lost its ports")
	}
	e.says("/services", answer{http.StatusServiceUnavailable, `{"message":"This node is not a swarm manager."}`, ""}, event)
	eventually(t, "the container's", func() bool { return b.has(8080) })
	eventually(t, "nothing", func() bool { return only.has() })

	// One that is not in a swarm is not asked.
	e.says("/services", services)
	e.says("/info", answer{body: `{"Swarm":{"LocalNodeState":"inactive","ControlAvailable":false}}`}, event)
	asked, known := e.count("/services"), e.count("/info")
	eventually(t, "both have looked again", func() bool { return e.count("/info") >= known+6 })
	if n := e.count("/services"); n > asked+2 || !only.has() { // two may have been on their way
		t.Errorf("an engine without a swarm was asked for its services %d times", n-asked)
	}
}

// TestNonsense: what is no list withdraws nothing.
func TestNonsense(t *testing.T) {
	t.Parallel()
	e := newEngine(t)
	e.says("/containers/json", e.runs(8080))
	e.start(t)
	b := watch(t, Config{Socket: e.socket})
	eventually(t, "a port", func() bool { return b.has(8080) })
	lists := e.count("/containers/json")
	e.says("/containers/json", answer{body: `{"message":`}, "{}", startEvent)
	eventually(t, "it has asked again", func() bool { return e.count("/containers/json") > lists+1 })
	if !b.has(8080) {
		t.Error("the port is withdrawn")
	}
	e.says("/containers/json", e.runs(8080, 8081), "this is no JSON")
	eventually(t, "a new session", func() bool { return b.has(8080, 8081) })
}
