package arch

import (
	"io/fs"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// What `make install` puts into place `make uninstall` takes away, and nothing else.
func TestInstall(t *testing.T) {
	dir := t.TempDir()
	run := func(target string) (files []string) {
		t.Helper()
		cmd := exec.Command("make", "-s", target, "DESTDIR="+dir, "PREFIX=/opt/s")
		cmd.Dir = root
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("make %s: %v\n%s", target, err, out)
		}
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err == nil && !d.IsDir() {
				files = append(files, strings.TrimPrefix(path, dir))
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return files
	}
	all := strings.Join(run("install"), " ")
	for _, want := range []string{"/opt/s/bin/slipway", "/opt/s/bin/slipway-docker-proxy", "/man1/slipway-ports-add.1", "/man5/slipway.toml.5", "/slipway@.service", "/_slipway"} {
		if !strings.Contains(all, want) {
			t.Errorf("%s is not installed: %s", want, all)
		}
	}
	if left := run("uninstall"); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}
