package docker

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestDockerdWrapper: what becomes dockerd sees neither the host's containerd, unless it is
// told to use it, nor the plugins of another dockerd, and otherwise sees what is there.
func TestDockerdWrapper(t *testing.T) {
	if err := exec.Command("unshare", "-rm", "true").Run(); err != nil {
		missing(t, err)
	}
	tests := []struct {
		name  string
		place string // in the host's /run, with one file
		file  string // "ro": it cannot be written there
		extra []string
		want  string // what is seen there
	}{
		{"containerd", "containerd", "containerd.sock", nil, ""},
		{"containerd that is given", "containerd", "containerd.sock", []string{"--containerd", "/run/containerd/containerd.sock"}, "containerd.sock"},
		{"no containerd", "containerd", "other.sock", nil, "other.sock"},
		{"no containerd, a user", "containerd", "ro", nil, ""},
		{"plugins", "docker", "plugin.sock", []string{"--containerd=/c.sock"}, ""},
		{"no plugins", "other", "plugin.sock", nil, "plugin.sock"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			ln, err := net.Listen("unix", filepath.Join(dir, tt.file))
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			const host = `mount -t tmpfs none /run && mkdir "/run/$2" && mount --bind "$1" "/run/$2" && { [ ! -e "$1/ro" ] || mount -o remount,bind,ro "/run/$2"; } && shift 2 && exec "$@"`
			args := append([]string{"-rm", "sh", "-ec", host, "sh", dir, tt.place}, DockerdWrapper(tt.extra)...)
			out, err := exec.Command("unshare", append(args, "ls", "-A", "/run/"+tt.place)...).CombinedOutput()
			if got := strings.TrimSpace(string(out)); err != nil || got != tt.want {
				t.Errorf("the engine sees %q, %v, want %q", got, err, tt.want)
			}
			if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
				t.Errorf("the host sees %v, %v", left, err)
			}
		})
	}
}

// TestDockerdWrapperMakes: two engines do not share a directory that none had before; a user who
// cannot make it leaves the word to dockerd.
func TestDockerdWrapperMakes(t *testing.T) {
	if err := exec.Command("unshare", "-rm", "true").Run(); err != nil {
		missing(t, err)
	}
	for _, mode := range []string{"rw", "ro"} {
		script := `mount -t tmpfs none /run && mount -o remount,` + mode + ` /run && exec "$@"`
		args := append([]string{"-rm", "sh", "-ec", script, "sh"}, DockerdWrapper(nil)...)
		out, err := exec.Command("unshare", append(args, "sh", "-c", "grep -c ' /run/docker tmpfs ' /proc/mounts || true")...).CombinedOutput()
		want := map[string]string{"rw": "1", "ro": "0"}[mode]
		if got := strings.TrimSpace(string(out)); err != nil || got != want {
			t.Errorf("/run is %s: %q mounts, %v, want %s", mode, got, err, want)
		}
	}
}
