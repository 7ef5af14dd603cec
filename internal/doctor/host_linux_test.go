package doctor

import (
	"context"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// missing is called when this machine lacks what a test needs.
func missing(t *testing.T, why string) {
	t.Helper()
	if os.Getenv("NETNS_TESTS") == "require" {
		t.Fatalf("this machine lacks what the test needs: %s", why)
	}
	t.Skipf("this machine lacks what the test needs: %s", why)
}

// Check says the same names whatever it finds, one line each, and leaves no trace.
func TestCheckHere(t *testing.T) {
	before := devices(t)
	for _, rootless := range []bool{false, true} {
		start := time.Now()
		findings := Check(t.Context(), Options{Rootless: rootless})
		if took := time.Since(start); took > 10*time.Second {
			t.Errorf("Check took %v", took)
		}
		var names []string
		for _, f := range findings {
			names = append(names, f.Name)
			if f.Detail == "" || strings.Contains(f.Detail+f.Fix, "\n") || !slices.Contains([]Status{OK, Warn, Fail}, f.Status) {
				t.Errorf("finding %+v", f)
			}
			t.Log(Format(f))
		}
		want := []string{"kernel", "tun", "capabilities", "tun offloads", "nf_tables", "ping sockets", "nsenter",
			"default route IPv4", "default route IPv6", "state directory", "open files", "resolv.conf"}
		if rootless || os.Geteuid() != 0 {
			want = slices.Replace(want, 2, 3, "user namespaces", "subordinate ids")
		}
		if !slices.Equal(names, want) {
			t.Errorf("findings %q, want %q", names, want)
		}
	}
	if after := devices(t); !slices.Equal(before, after) {
		t.Errorf("network devices before %q, after %q", before, after)
	}
}

// devices are the names of the network devices of this namespace.
func devices(t *testing.T) []string {
	t.Helper()
	b, err := os.ReadFile("/proc/net/dev")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for line := range strings.Lines(string(b)) {
		if name, _, ok := strings.Cut(line, ":"); ok {
			names = append(names, strings.TrimSpace(name))
		}
	}
	return names
}

// The child makes a device and loads rules, as root of its own namespaces.
func TestTrial(t *testing.T) {
	if err := openAndClose("/dev/net/tun"); err != nil {
		missing(t, "/dev/net/tun: "+err.Error())
	}
	for _, rootless := range []bool{true, false} {
		if !rootless && os.Geteuid() != 0 {
			continue
		}
		r, err := runTrial(t.Context(), rootless)
		if err != nil {
			missing(t, "a namespace: "+err.Error())
		}
		if r.TUN != "" || !slices.Contains(r.Accepted, "csum") {
			t.Errorf("rootless %v: %+v", rootless, r)
		}
		if r.NFT != "" {
			missing(t, "nf_tables: "+r.NFT)
		}
	}
}

func TestTrialEndsWithContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if r, err := runTrial(ctx, true); err == nil {
		t.Errorf("a trial after the end of its context: %+v", r)
	}
	findings := newHost(Options{Rootless: true}).check(ctx)
	if len(findings) == 0 {
		t.Error("no findings")
	}
}

func TestPrivileged(t *testing.T) {
	plain := t.TempDir() + "/plain"
	if err := os.WriteFile(plain, nil, 0o755); err != nil {
		t.Fatal(err)
	}
	if privileged(plain) || privileged(plain+"-not-there") {
		t.Error("a plain file is privileged")
	}
	if err := os.Chmod(plain, 0o755|os.ModeSetuid); err != nil {
		t.Fatal(err)
	}
	if !privileged(plain) {
		t.Error("a set-uid file is not privileged")
	}
}
