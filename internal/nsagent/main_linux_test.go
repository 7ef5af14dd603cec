package nsagent

import (
	"context"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestMain(m *testing.M) {
	if IsAgent() {
		Main()
	}
	os.Exit(m.Run())
}

func testSpec(t testing.TB) Spec {
	t.Helper()
	dir := t.TempDir()
	write := func(name, text string) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return p
	}
	return Spec{
		TUN:          TUN{MTU: 1500},
		Addresses:    []netip.Prefix{netip.MustParsePrefix("192.168.65.3/24"), netip.MustParsePrefix("fdc4:f303:9324::3/64")},
		Gateway4:     netip.MustParseAddr("192.168.65.1"),
		Gateway6:     netip.MustParseAddr("fdc4:f303:9324::1"),
		Default4:     true,
		ResolvConf:   write("resolv.conf", "nameserver 192.168.65.1\n"),
		Hosts:        write("hosts", "127.0.0.1 localhost our-hosts\n"),
		IdentitySNAT: true,
		PingRange:    true,
		StopTimeout:  2 * time.Second,
	}
}

func TestDemo(t *testing.T) {
	spec := testSpec(t)
	spec.Rootless = os.Getenv("ROOTLESS") != ""
	spec.IdentitySNAT = os.Getenv("NOSNAT") == ""
	if os.Getenv("NONAMES") != "" {
		spec.ResolvConf, spec.Hosts = "", ""
	}
	spec.PIDNamespace = os.Getenv("PIDNS") != ""
	t0 := time.Now()
	a, err := Start(context.Background(), spec, slog.Default())
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("start %v report %+v", time.Since(t0), a.Report())
	script := os.Getenv("SCRIPT")
	if script == "" {
		script = "id; ip a; ip r; ip -6 r; cat /etc/resolv.conf /etc/hosts; ls /sys/class/net /sys/fs/cgroup; nft list ruleset; grep Cap /proc/self/status; ps aux | tail -5; ls -la /proc/self/fd"
	}
	t1 := time.Now()
	p, err := a.Exec(context.Background(), Command{Args: []string{"sh", "-c", script}, Env: os.Environ(), Stdout: os.Stdout, Stderr: os.Stderr})
	if err != nil {
		t.Fatal(err)
	}
	st, err := p.Wait()
	t.Logf("exec %v, %v %v", time.Since(t1), st, err)
	t1 = time.Now()
	a.Close(context.Background())
	t.Logf("close %v", time.Since(t1))
	t1 = time.Now()
	a.TUN().Close()
	a.Release()
	t.Logf("tun close %v", time.Since(t1))
}
