package test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// A current dockerd of an ordinary user, as docs/docker.md says: in a cgroup v2 tree that
// the user may write to, and that dockerd sees as the root of all.

// TestPublishRootlessDocker is the life of published containers without root.
func TestPublishRootlessDocker(t *testing.T) {
	needDockerd(t)
	need(t, "unshare", "setpriv", "newuidmap")
	n := newTopology(t)
	d := newUpDocker(t, dockerdKind{"current", newestDockerdForAll(t), []string{"--feature", "time-namespaces=false"}}, "")
	d.engine.user = user{rootless: true}
	tree := cgroupForUser(t)
	data := d.dir + "/var"
	for _, err := range []error{os.Chmod(d.dir, 0o755), os.Chown(data, ordinaryUser, ordinaryUser)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	d.starter = func(up *exec.Cmd) *exec.Cmd {
		id := fmt.Sprint(ordinaryUser)
		cmd := exec.Command("sh", append([]string{"-c", `echo $$ >` + tree + `/cgroup.procs && exec unshare --mount --cgroup sh -c 'mount -t cgroup2 none /sys/fs/cgroup && exec "$@"' sh "$@"`,
			"sh", "setpriv", "--reuid", id, "--regid", id, "--clear-groups"}, up.Args...)...)
		cmd.Dir, cmd.Env = up.Dir, append(up.Env, "XDG_DATA_HOME="+data)
		return cmd
	}
	d.up(t, n)
	d.must(t, "import", busyboxImage(t, d.dir), dockerImage)
	expectListeners(t, n, "no container")

	id := d.runImage(t, "-p", "18080:80", "-p", "18080:80/udp", "-p", "127.0.0.1:18081:80", "-p", "198.51.100.2:18082:80", "-p", "198.51.100.2:18082:80/udp")
	all := [][]string{onAll("tcp", 18080), onAll("udp", 18080), {"tcp 127.0.0.1:18081", "tcp 198.51.100.2:18082", "udp 198.51.100.2:18082"}}
	expectListeners(t, n, "docker run", all...)
	d.inside(t, id)
	d.expectSources(t, n)
	d.conflict(t, n, all)
	d.must(t, "stop", id)
	expectListeners(t, n, "docker stop")
	d.must(t, "start", id)
	expectListeners(t, n, "docker start", all...)
	d.kill(t, id)
	expectListeners(t, n, "kill -9 of a container")
	always := d.runImage(t, "--restart", "always", "-p", "18083:80")
	expectListeners(t, n, "docker run again", onAll("tcp", 18083))
	d.stop(t)
	expectListeners(t, n, "slipway stopped")
	d.up(t, n)
	expectListeners(t, n, "slipway started again", onAll("tcp", 18083))
	d.inside(t, always)
	reach(t, n, "tcp", 18083)
	d.must(t, "rm", "-f", id, always)
	expectListeners(t, n, "docker rm")
}

// newestDockerdForAll is newestDockerd at a path that every user may run.
func newestDockerdForAll(t *testing.T) string {
	t.Helper()
	const path = "/run/slipway-test-dockerd"
	if err := os.WriteFile(path, nil, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(newestDockerd(t), path, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(path, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
		os.Remove(path)
	})
	return path
}

// cgroupForUser makes a tree of cgroup v2 for the ordinary user; with controllers of
// version 1 in use it has none.
func cgroupForUser(t *testing.T) (dir string) {
	t.Helper()
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); slices.Contains(f, "cgroup2") && len(f) > 4 {
			dir = f[4]
		}
	}
	if dir == "" {
		missing(t, "a mount of cgroup2")
	}
	dir = filepath.Join(dir, "slipway-test-"+newName()+fmt.Sprint(os.Getpid()))
	if err := os.Mkdir(dir, 0o755); err != nil {
		missing(t, "a cgroup of one's own: %v", err)
	}
	t.Cleanup(func() { removeTree(t, dir) })
	for _, file := range []string{"", "cgroup.procs", "cgroup.subtree_control", "cgroup.threads"} {
		if err := os.Chown(filepath.Join(dir, file), ordinaryUser, ordinaryUser); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// removeTree removes the cgroups from the bottom up.
func removeTree(t *testing.T, dir string) {
	var dirs []string
	filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if err == nil && e.IsDir() {
			dirs = append(dirs, path)
		}
		return nil
	})
	slices.Reverse(dirs)
	for _, d := range dirs {
		if err := os.Remove(d); err != nil {
			t.Error(err)
		}
	}
}
