package daemon

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"runtime"
	"runtime/metrics"
	"strconv"
	"strings"
	"time"

	"github.com/slipway-net/slipway/internal/api"
	"github.com/slipway-net/slipway/internal/flow"
	"github.com/slipway-net/slipway/internal/nsagent"
)

// addAPI opens the control socket.
func (e *engine) addAPI(s *services) error {
	path := e.state.file(socketName)
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return fmt.Errorf("listen on %s: %w", path, err)
	}
	// Nobody else got in meanwhile: the directory is ours alone.
	if err := os.Chmod(path, 0o600); err != nil {
		ln.Close()
		return fmt.Errorf("listen on %s: %w", path, err)
	}
	if err := e.linkNamespace(); err != nil {
		ln.Close()
		return err
	}
	server := api.NewServer(backend{e}, e.log)
	s.start("api", func(ctx context.Context) error { return server.Serve(ctx, ln) })
	return nil
}

// backend is an engine as its control API sees it.
type backend struct{ *engine }

// Flows implements api.Backend.
func (b backend) Flows() []*flow.Flow { return b.table.Snapshot() }

// Exec implements api.Backend.
func (b backend) Exec(ctx context.Context, r api.ExecRequest, stdio [3]*os.File) (api.Process, error) {
	p, err := b.agent.Exec(ctx, nsagent.Command{
		Args: r.Args, Env: b.guestEnv(r.Env), Dir: string(r.Dir), TTY: r.TTY,
		Stdin: stdio[0], Stdout: stdio[1], Stderr: stdio[2],
	})
	if err != nil {
		problem := withHint(err).(*Problem)
		return nil, &api.Error{Message: problem.Error(), Hint: problem.Hint, Code: problem.Code}
	}
	return process{p}, nil
}

// process is a command as the control API sees it.
type process struct{ *nsagent.Process }

// Wait implements api.Process.
func (p process) Wait() (int, error) {
	status, err := p.Process.Wait()
	return status.Code, err
}

// Status implements api.Backend.
func (b backend) Status() api.Status {
	e := b.engine
	report := e.agent.Report()
	forwarded := e.forward.Stats()
	return api.Status{
		Engine: e.statusEngine(string(report.Mapping)),
		Path:   e.statusPath(),
		Link: api.LinkStatus{
			Device: nsagent.DefaultTUN, MTU: e.cfg.MTU,
			OffloadsAccepted: list(e.link.Offloads().Accepted), OffloadsRefused: list(e.link.Offloads().Refused),
		},
		Addresses: e.statusAddresses(report.SNAT),
		DNS:       api.DNSStatus{Servers: list(e.net.upstreams()), Source: hostResolvConf},
		Ping:      e.statusPing(report.PingRange),
		Policy:    api.Policy{HostAccess: e.cfg.HostAccess.String(), HostAddresses: e.cfg.HostAddresses},
		Flows:     e.statusFlows(),
		Memory:    statusMemory(),
		Counters: map[string]map[string]int64{
			"netstack": counters(e.stack.Stats()),
			"kernel":   e.kernel.counters(e.agent),
			"tcp":      counters(forwarded.TCP),
			"udp":      counters(forwarded.UDP),
			"ping":     counters(forwarded.Ping),
			"publish":  e.publishCounters(),
			"dns":      counters(e.dns.Stats()),
		},
		Warnings: e.statusWarnings(report),
	}
}

func (e *engine) statusEngine(mapping string) api.Engine {
	s := api.Engine{
		Name: e.opts.Name, Mode: string(e.opts.Mode), Command: e.opts.Command, Version: e.opts.Version,
		PID: os.Getpid(), AgentPID: e.agent.PID(),
		Started: e.started, UptimeSeconds: time.Since(e.started).Seconds(),
		StateDir: e.state.path, UserNamespace: mapping, Isolate: []string{"net"},
	}
	if p := e.main.Load(); p != nil {
		s.CommandPID = p.PID()
	}
	if e.opts.Mode == ModeAttach {
		return s // the namespaces are somebody else's
	}
	if e.cfg.IsolateMount {
		s.Isolate = append(s.Isolate, "mount")
	}
	if e.cfg.IsolatePID {
		s.Isolate = append(s.Isolate, "pid")
	}
	return s
}

func (e *engine) statusAddresses(shared string) api.Addresses {
	n := &e.net
	return api.Addresses{
		Subnet4: n.subnet4, Subnet6: n.subnet6,
		Gateway4: n.Gateway4, Gateway6: n.Gateway6, Host4: n.Host4, Host6: n.Host6, Guest4: n.Guest4, Guest6: n.Guest6,
		Default4: n.host.Default4, Default6: n.host.Default6, Mirrored: len(n.mirrored),
		Shared: shared,
	}
}

func (e *engine) statusPing(groups string) api.PingStatus {
	m := e.forward.PingMode()
	return api.PingStatus{Mode: m.Mode, Why: m.Why, Hint: m.Hint, GroupRange: groups}
}

func (e *engine) statusFlows() []api.Flows {
	var out []api.Flows
	for p := flow.TCP; p <= flow.Ping; p++ {
		live, ended := e.table.Live(p), e.table.Ended(p)
		out = append(out, api.Flows{
			Proto: p, Live: int(live.Flows), Ended: ended.Flows,
			ToHostBytes:  live.ToHostBytes + ended.ToHostBytes,
			ToGuestBytes: live.ToGuestBytes + ended.ToGuestBytes,
		})
	}
	return out
}

// statusWarnings adds what the agent could not do to our own.
func (e *engine) statusWarnings(r nsagent.Report) []string {
	out := append([]string{}, e.warnings...)
	for _, w := range []struct{ what, why string }{
		{"guests share one address", r.SNAT},
		{"/sys shows the host's network devices", r.Sys},
		{"the guest has no IPv6", r.IPv6},
		{"ping inside needs root", r.PingNote},
		{"containers' ports cannot be published on one address of the host", r.NonlocalBind},
	} {
		if w.why != "" {
			out = append(out, w.what+": "+w.why)
		}
	}
	out = append(out, r.Names...)
	out = append(out, r.Routes...)
	return append(out, e.unpublishedWarnings()...)
}

// counters flattens a struct of numbers: what is {"drops":{"martian":1}} in JSON gets
// the name "drops.martian", and a field GuestLimit without a tag "guest_limit".
func counters(stats any) map[string]int64 {
	out := make(map[string]int64)
	b, err := json.Marshal(stats)
	if err != nil {
		return out
	}
	var tree map[string]any
	d := json.NewDecoder(strings.NewReader(string(b)))
	d.UseNumber()
	if d.Decode(&tree) == nil {
		flatten(out, "", tree)
	}
	return out
}

func flatten(out map[string]int64, prefix string, tree map[string]any) {
	for name, v := range tree {
		name = snake(name)
		switch v := v.(type) {
		case json.Number:
			if n, err := v.Int64(); err == nil {
				out[prefix+name] = n
			}
		case map[string]any:
			flatten(out, prefix+name+".", v)
		}
	}
}

// snake writes a Go name as the API does; names without capitals stay.
func snake(name string) string {
	var b strings.Builder
	for i, r := range name {
		if r >= 'A' && r <= 'Z' {
			if i > 0 {
				b.WriteByte('_')
			}
			r += 'a' - 'A'
		}
		b.WriteRune(r)
	}
	return b.String()
}

// list is s, and never null in JSON.
func list[T any](s []T) []T {
	if s == nil {
		return []T{}
	}
	return s
}

// statusMemory asks the runtime and the kernel.
func statusMemory() api.Memory {
	sample := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
	metrics.Read(sample)
	return api.Memory{Resident: resident(), Heap: sample[0].Value.Uint64(), Goroutines: runtime.NumGoroutine()}
}

// resident is our resident set in bytes, or 0: the second number of statm is in pages
// (proc(5)).
func resident() uint64 {
	b, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(b))
	if len(fields) < 2 {
		return 0
	}
	pages, err := strconv.ParseUint(fields[1], 10, 64)
	if err != nil {
		return 0
	}
	return pages * uint64(os.Getpagesize())
}
