package docker

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestDockerdCommand(t *testing.T) {
	const help20 = "      --userland-proxy-path string   Path to the userland\n      --rootless"
	const help28 = help20 + "\n      --allow-direct-routing   Allow remote access to published ports\n"
	state := DockerdOptions{StateDir: "/run/slipway/a", DataRoot: "/var/lib/slipway/a/docker", Help: help20}
	usual := []string{
		"--config-file", "/run/slipway/a/daemon.json", "--data-root", "/var/lib/slipway/a/docker",
		"--exec-root", "/run/slipway/a/docker", "--pidfile", "/run/slipway/a/docker.pid",
		"--host", "unix:///run/slipway/a/docker.sock", "--userland-proxy-path", "/run/slipway/a/slipway-docker-proxy",
	}
	with := func(words ...string) []string { return append(append([]string{"dockerd"}, usual...), words...) }
	tests := []struct {
		name   string
		change func(*DockerdOptions)
		want   []string
	}{
		{"docker_20", func(*DockerdOptions) {}, with()},
		{"docker_28", func(o *DockerdOptions) { o.Help = help28 }, with("--allow-direct-routing")},
		{"rootless", func(o *DockerdOptions) { o.Rootless = true }, with("--rootless")},
		{"rootless_28", func(o *DockerdOptions) { o.Rootless, o.Help = true, help28 }, with("--allow-direct-routing")},
		{"own_containerd", func(o *DockerdOptions) { o.Program, o.Extra = "/opt/dockerd", []string{"--containerd=/c.sock"} },
			append(append([]string{"/opt/dockerd"}, usual...), "--containerd=/c.sock")},
		{"given", func(o *DockerdOptions) {
			o.Help = help28
			o.Extra = []string{"--config-file=/etc/a.json", "-g", "/srv/a", "--exec-root", "/run/a", "-p/run/a.pid", "-H", "tcp://127.0.0.1:1",
				"--userland-proxy-path=/p", "--allow-direct-routing=false"}
		}, []string{"dockerd", "--host", "unix:///run/slipway/a/docker.sock", "--config-file=/etc/a.json", "-g", "/srv/a", "--exec-root", "/run/a",
			"-p/run/a.pid", "-H", "tcp://127.0.0.1:1", "--userland-proxy-path=/p", "--allow-direct-routing=false"}},
		{"configured", func(o *DockerdOptions) {
			o.Extra = []string{"--config-file", "/etc/a.json"}
			o.Configured = []string{"data-root", "exec-root", "hosts", "pidfile", "userland-proxy-path"}
		}, []string{"dockerd", "--host", "unix:///run/slipway/a/docker.sock", "--config-file", "/etc/a.json"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			o := state
			tt.change(&o)
			if got := DockerdCommand(o); !slices.Equal(got, tt.want) {
				t.Errorf("command is\n%q, want\n%q", got, tt.want)
			}
		})
	}
}

func TestDataRoot(t *testing.T) {
	for home, want := range map[string]string{"": "/var/lib/slipway/a/docker", "/home/u/.local/share": "/home/u/.local/share/slipway/a/docker"} {
		if got := DataRoot("a", home); got != filepath.FromSlash(want) {
			t.Errorf("DataRoot(a, %q) = %s, want %s", home, got, want)
		}
	}
}

func TestConfigured(t *testing.T) {
	file := filepath.Join(t.TempDir(), "daemon.json")
	if err := os.WriteFile(file, []byte(`{"hosts": [], "data-root": "/srv"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"--config-file", file}, {"-D", "--config-file=" + file}} {
		if got := Configured(args, os.ReadFile); !slices.Equal(got, []string{"data-root", "hosts"}) {
			t.Errorf("%q: keys are %q", args, got)
		}
	}
	for _, args := range [][]string{nil, {"--config-file"}, {"--config-file", file + ".none"}} {
		if got := Configured(args, os.ReadFile); got != nil {
			t.Errorf("%q: keys are %q", args, got)
		}
	}
}

func TestPrepare(t *testing.T) {
	dir := t.TempDir()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // what an earlier one left is no obstacle
		if err := Prepare(dir, exe); err != nil {
			t.Fatal(err)
		}
	}
	if to, err := os.Readlink(filepath.Join(dir, ProxyName)); to != exe || err != nil {
		t.Errorf("the proxy leads to %q, %v", to, err)
	}
	if b, err := os.ReadFile(filepath.Join(dir, ConfigName)); string(b) != "{}\n" || err != nil {
		t.Errorf("the configuration is %q, %v", b, err)
	}
	if err := Prepare(filepath.Join(dir, "none"), exe); err == nil {
		t.Error("a directory that is not there is none")
	}
}

// TestHelp: the real dockerd's help is read as meant.
func TestHelp(t *testing.T) {
	if _, err := exec.LookPath("dockerd"); err != nil {
		missing(t, err)
	}
	help, err := Help(t.Context(), "")
	if err != nil || !knows(help, "userland-proxy-path") || knows(help, "userland") {
		t.Errorf("help of dockerd: %v\n%s", err, help)
	}
	if _, err := Help(t.Context(), "/none/dockerd"); err == nil || !strings.Contains(err.Error(), "/none/dockerd") || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without a dockerd: %v", err)
	}
}

// missing is called when this machine lacks what a test needs.
func missing(t *testing.T, err error) {
	t.Helper()
	if os.Getenv("NETNS_TESTS") == "require" {
		t.Fatalf("this machine lacks what the test needs: %v", err)
	}
	t.Skipf("this machine lacks what the test needs: %v", err)
}

func TestProxyOff(t *testing.T) {
	files := map[string]string{
		"off.json": `{"userland-proxy": false}`, "on.json": `{"userland-proxy": true}`, "other.json": `{"userland-proxy-path": "/usr/bin/p"}`,
		"none.json": `{"debug": true}`, "broken.json": `{"userland-proxy": fal`,
	}
	read := func(name string) ([]byte, error) {
		if s, ok := files[name]; ok {
			return []byte(s), nil
		}
		return nil, os.ErrNotExist
	}
	for args, want := range map[string]bool{
		"":                                      false,
		"--debug":                               false,
		"--userland-proxy":                      false,
		"--userland-proxy=true":                 false,
		"--userland-proxy=false":                true,
		"--userland-proxy=0":                    true,
		"--userland-proxy=nonsense":             false,
		"--userland-proxy-path /bin/p":          true,
		"--userland-proxy-path=/bin/p":          true,
		"--config-file off.json":                true,
		"--config-file=on.json":                 false,
		"--config-file other.json":              true,
		"--config-file none.json":               false,
		"--config-file broken.json":             false,
		"--config-file missing.json":            false,
		"--userland-proxy=0 --userland-proxy=1": false,
	} {
		if got := ProxyOff(strings.Fields(args), read); got != want {
			t.Errorf("%q: %v, want %v", args, got, want)
		}
	}
}
