package doctor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
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
		want := []string{"kernel", "tun", "capabilities", "tun offloads", "nf_tables", "kernel path", "ping sockets",
			"privileged ports", "icmp errors", "nsenter",
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

// devices are the names of slipway's network devices in this namespace; others come and go.
func devices(t *testing.T) []string {
	t.Helper()
	b, err := os.ReadFile("/proc/net/dev")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for line := range strings.Lines(string(b)) {
		if name, _, ok := strings.Cut(strings.TrimSpace(line), ":"); ok && strings.HasPrefix(name, "slipway") {
			names = append(names, name)
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
		if r.Kernel != "" || len(r.KernelLacks) > 0 {
			missing(t, fmt.Sprintf("the kernel path: %s, lacks %q", r.Kernel, r.KernelLacks))
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

// Every part has a trial, and what is not there is told from what fails.
func TestKernelTrials(t *testing.T) {
	for _, p := range kernelParts {
		if kernelTrials[p.name] == nil {
			t.Errorf("%s is not tried", p.name)
		}
	}
	if len(kernelTrials) != len(kernelParts) {
		t.Errorf("%d trials of %d parts", len(kernelTrials), len(kernelParts))
	}
	if !absent(unix.ENOENT) || absent(unix.EPERM) || absent(nil) {
		t.Error("absent does not know what is absent")
	}
}

// Whoever may not take a low port gets the error that the finding is about.
func TestBindLow(t *testing.T) {
	b, err := os.ReadFile("/proc/sys/net/ipv4/ip_unprivileged_port_start")
	if err != nil {
		t.Fatal(err)
	}
	err = bindLow()
	switch first := strings.TrimSpace(string(b)); {
	case os.Geteuid() == 0, first == "0", first == "1":
		if err != nil && !errors.Is(err, unix.EADDRINUSE) {
			t.Error(err)
		}
	case !errors.Is(err, unix.EACCES):
		t.Errorf("an ordinary user, ports from %s on: %v", first, err)
	}
}
