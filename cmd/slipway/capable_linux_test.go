package main

import (
	"encoding/binary"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// envPretend has the test program be a fake engine of another user's, of that name.
const envPretend = "SLIPWAY_TEST_PRETEND"

// nobody is a user without anything.
const nobody = 65534

// A binary that was given cap_net_bind_service, as the hint for ports below 1024 says, can
// still ask an engine, whose daemon has no capability.
func TestCapableClient(t *testing.T) {
	if name := os.Getenv(envPretend); name != "" {
		pretend(t, name)
		os.Stdout.WriteString("ready")
		io.Copy(io.Discard, os.Stdin)
		return
	}
	dir := publicDir(t)
	capable := filepath.Join(dir, "capable")
	makeCopy(t, capable, bin)
	setCapable(t, capable)
	serveAsNobody(t, dir, "web")
	for _, words := range []string{"ports add web 8080:80", "ports ls web", "ls", "status web"} {
		cmd := exec.CommandContext(t.Context(), capable, strings.Fields(words)...)
		asNobody(cmd, dir)
		if out, err := cmd.CombinedOutput(); err != nil || strings.Contains(string(out), "slipway: ") {
			t.Errorf("%s: %v, %s", words, err, out)
		}
	}
}

// serveAsNobody runs a fake engine as nobody until the test ends.
func serveAsNobody(t *testing.T, dir, name string) {
	t.Helper()
	exe := filepath.Join(dir, "server")
	makeCopy(t, exe, "/proc/self/exe")
	cmd := exec.CommandContext(t.Context(), exe, "-test.run=^TestCapableClient$")
	asNobody(cmd, dir)
	cmd.Env = append(cmd.Env, envPretend+"="+name)
	in, err1 := cmd.StdinPipe()
	out, err2 := cmd.StdoutPipe()
	if err1 != nil || err2 != nil {
		t.Fatal(err1, err2)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		cmd.Wait()
	})
	ready := make([]byte, len("ready"))
	if _, err := io.ReadFull(out, ready); err != nil || string(ready) != "ready" {
		t.Fatalf("the fake engine said %q, %v", ready, err)
	}
}

func asNobody(cmd *exec.Cmd, dir string) {
	cmd.Dir = dir
	cmd.Env = []string{"XDG_RUNTIME_DIR=" + dir, "PATH=" + os.Getenv("PATH")}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
}

// publicDir is a directory of nobody's.
func publicDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "slipway-capable-") // those of t.TempDir are in one of ours
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chown(dir, nobody, nobody); err != nil {
		notAvailable(t, err)
	}
	return dir
}

func makeCopy(t *testing.T, to, from string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, b, 0o755); err != nil {
		t.Fatal(err)
	}
}

// setCapable is setcap cap_net_bind_service=+ep.
func setCapable(t *testing.T, path string) {
	t.Helper()
	const revision2, effective = 0x02000000, 1 // of struct vfs_cap_data, <linux/capability.h>
	b := binary.LittleEndian.AppendUint32(nil, revision2|effective)
	b = binary.LittleEndian.AppendUint32(b, 1<<unix.CAP_NET_BIND_SERVICE)
	b = append(b, make([]byte, 12)...) // not inheritable, and none of the upper 32
	if err := unix.Setxattr(path, "security.capability", b, 0); err != nil {
		notAvailable(t, err)
	}
}

// notAvailable skips a test, or fails it where skips are not allowed.
func notAvailable(t *testing.T, err error) {
	t.Helper()
	if os.Getenv("NETNS_TESTS") == "require" {
		t.Fatalf("not available: %v", err)
	}
	t.Skipf("not available: %v", err)
}
