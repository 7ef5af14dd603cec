package docker

import (
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestOwnContainerd: what becomes dockerd does not see the host's containerd, and
// otherwise sees what is there.
func TestOwnContainerd(t *testing.T) {
	if err := exec.Command("unshare", "-rm", "true").Run(); err != nil {
		missing(t, err)
	}
	for _, name := range []string{"containerd.sock", "other.sock"} {
		dir := t.TempDir()
		ln, err := net.Listen("unix", filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		const host = `mount -t tmpfs none /run && mkdir /run/containerd && mount --bind "$1" /run/containerd && shift && exec "$@"`
		out, err := exec.Command("unshare", "-rm", "sh", "-ec", host, "sh", dir,
			"/bin/sh", "-c", ownContainerd, "sh", "ls", "-A", "/run/containerd").CombinedOutput()
		want := ""
		if name != "containerd.sock" {
			want = name
		}
		if got := strings.TrimSpace(string(out)); err != nil || got != want {
			t.Errorf("with %s the engine sees %q, %v, want %q", name, got, err, want)
		}
	}
}
