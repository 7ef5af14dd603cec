package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"

	"go.uber.org/goleak"

	"github.com/slipway-net/slipway/forward"
	"github.com/slipway-net/slipway/internal/config"
	"github.com/slipway-net/slipway/internal/nsagent"
	"github.com/slipway-net/slipway/stack/netstack"
)

func TestMain(m *testing.M) {
	if nsagent.IsAgent() {
		nsagent.Main()
	}
	goleak.VerifyTestMain(m)
}

// A whole engine in this process leaves no goroutine and no file descriptor.
func TestRunLeavesNothing(t *testing.T) {
	if f, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0); err != nil {
		if os.Getenv("NETNS_TESTS") == "require" {
			t.Fatalf("not available: %v", err)
		}
		t.Skipf("not available: %v", err)
	} else {
		f.Close()
	}
	t.Setenv("XDG_RUNTIME_DIR", t.TempDir())
	run := func() {
		t.Helper()
		var log bytes.Buffer
		code, err := Run(t.Context(), Options{
			Mode: ModeRun, Name: NameFor([]string{"test"}, os.Getpid()), Command: []string{"sh", "-c", "exit 7"},
			Env: os.Environ(), Config: config.Default(), Log: &log,
		})
		if err != nil || code != 7 {
			t.Fatalf("Run = %d, %v\n%s", code, err, log.String())
		}
	}
	run() // what is opened once and kept: the netpoller, for one
	before := descriptors(t)
	run()
	if after := descriptors(t); !maps.Equal(before, after) {
		t.Errorf("descriptors before %v, after %v", before, after)
	}
}

// descriptors returns what is open, by number.
func descriptors(t *testing.T) map[string]string {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	open := make(map[string]string)
	for _, e := range list {
		if to, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil {
			open[e.Name()] = to
		}
	}
	return open
}

func TestExitCodesAndHints(t *testing.T) {
	tests := []struct {
		err  error
		code int
		hint string
	}{
		{errors.New("x"), 125, ""},
		{fmt.Errorf("a: %w", &nsagent.ExecError{Code: 126, Name: "x", Err: syscall.EACCES}), 126, ""},
		{&nsagent.ExecError{Code: 127, Name: "x", Err: syscall.ENOENT}, 127, ""},
		{fmt.Errorf("a: %w", &nsagent.Error{Op: "open", On: "x", Err: syscall.EACCES, Hint: "mend it"}), 125, "mend it"},
		{fmt.Errorf("a: %w", ErrRunning), 125, "see it with: slipway ls; run and attach take another name with --name"},
	}
	for _, tt := range tests {
		var p *Problem
		if err := withHint(tt.err); !errors.As(err, &p) || !errors.Is(err, tt.err) {
			t.Fatalf("withHint(%v) = %v", tt.err, err)
		}
		if p.Code != tt.code || p.Hint != tt.hint || p.Error() != tt.err.Error() {
			t.Errorf("withHint(%v) = %+v, want %d and %q", tt.err, p, tt.code, tt.hint)
		}
	}
}

func TestCounters(t *testing.T) {
	got := counters(netstack.Stats{FromGuestPackets: 3, Drops: netstack.Drops{Martian: 4}})
	if got["from_guest_packets"] != 3 || got["drops.martian"] != 4 {
		t.Errorf("netstack: %v", got)
	}
	for name := range counters(forward.Stats{}.UDP) {
		if strings.ToLower(name) != name {
			t.Errorf("counter %q", name)
		}
	}
}

// testEngine is an engine that never started.
func testEngine(t *testing.T, o Options) (*engine, *bytes.Buffer) {
	t.Helper()
	var out bytes.Buffer
	e := &engine{opts: o, level: new(slog.LevelVar)}
	e.level.Set(slog.LevelInfo)
	e.log = slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: e.level}))
	var err error
	if e.cfg, err = o.Config.Engine(o.Name); err != nil {
		t.Fatal(err)
	}
	return e, &out
}

func TestReload(t *testing.T) {
	parse := func(text string) func() (*config.Config, error) {
		return func() (*config.Config, error) { return config.Parse("s.toml", []byte(text)) }
	}
	tests := []struct {
		name   string
		reload func() (*config.Config, error)
		level  slog.Level
		want   string // in the log
	}{
		{"no file", nil, slog.LevelInfo, "there is no file"},
		{"level", parse(`log_level = "debug"`), slog.LevelDebug, "read again"},
		{"level of the engine", parse("log_level = \"error\"\n[engine.a]\nlog_level = \"info\""), slog.LevelInfo, "read again"},
		{"what needs a restart", parse("log_level = \"info\"\nmtu = 1400\nhost_access = \"all\""), slog.LevelInfo, `settings="host_access mtu"`},
		{"broken", parse("mtu = 1\nx = 2"), slog.LevelInfo, "s.toml:2:1: x: unknown key"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			e, out := testEngine(t, Options{Name: "a", Config: config.Default(), Reload: tt.reload})
			e.reload(t.Context())
			if e.level.Level() != tt.level || !strings.Contains(out.String(), tt.want) {
				t.Errorf("level %v, want %v; log %s", e.level.Level(), tt.level, out.String())
			}
		})
	}
}

func TestSubnetMoves(t *testing.T) {
	pinned := config.Default()
	if err := pinned.Set("ipv4_subnet", "192.168.65.0/24", "--x"); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name   string
		config *config.Config
		route  string
		stays  bool
		warned bool
	}{
		{"free", config.Default(), "10.0.0.0/8", true, false},
		{"overlap", config.Default(), "192.168.0.0/16", false, true},
		{"pinned", pinned, "192.168.65.0/28", true, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e, _ := testEngine(t, Options{Name: "a", Config: tt.config})
			e.net.host.Routes = []netip.Prefix{netip.MustParsePrefix(tt.route)}
			got := e.subnet("ipv4_subnet", e.cfg.IPv4Subnet)
			if (got == e.cfg.IPv4Subnet) != tt.stays || !tt.stays && got.Overlaps(e.net.host.Routes[0]) {
				t.Errorf("subnet %v", got)
			}
			if (len(e.warnings) > 0) != tt.warned {
				t.Errorf("warnings %v", e.warnings)
			}
		})
	}
}

func TestServicesStop(t *testing.T) {
	s := newServices(t.Context())
	var order []string
	s.onStop(func() { order = append(order, "first made") })
	s.onStop(func() { order = append(order, "last made") })
	s.start("waits", func(ctx context.Context) error { <-ctx.Done(); return nil })
	late := make(chan struct{})
	s.start("needed", func(context.Context) error { <-late; return errors.New("it broke") })
	s.start("needs it", func(context.Context) error { return errors.New("what I need broke") })
	<-s.failed
	close(late)
	s.stop()
	s.stop()
	if err := s.err(); err == nil || err.Error() != "serve needed: it broke" {
		t.Errorf("the cause is %v", err)
	}
	if len(order) != 2 || order[0] != "last made" {
		t.Errorf("order %v", order)
	}
}
