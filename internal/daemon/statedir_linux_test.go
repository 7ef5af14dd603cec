package daemon

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
)

func TestStateDirLife(t *testing.T) {
	root := filepath.Join(t.TempDir(), "slipway")
	s, err := openState(root, "a")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := openState(root, "a"); !errors.Is(err, ErrRunning) {
		t.Errorf("second open = %v, want ErrRunning", err)
	}
	if names, err := enginesIn(root); err != nil || !slices.Equal(names, []string{"a"}) {
		t.Errorf("engines = %v, %v", names, err)
	}
	if err := s.write("resolv.conf", []byte("x")); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(root); !os.IsNotExist(err) {
		t.Errorf("root is left: %v", err)
	}
	if names, err := enginesIn(root); err != nil || len(names) != 0 {
		t.Errorf("engines = %v, %v", names, err)
	}
}

// A look at an engine that has just ended leaves nothing.
func TestStateDirLook(t *testing.T) {
	root := filepath.Join(t.TempDir(), "slipway")
	if locked(filepath.Join(root, "a", "lock")) {
		t.Error("it is running")
	}
	if _, err := os.Lstat(root); !os.IsNotExist(err) {
		t.Errorf("root is made: %v", err)
	}
}

// A daemon that was killed leaves its directory; the lock is gone with it, and that of the
// guest with the agent.
func TestStateDirStale(t *testing.T) {
	root := filepath.Join(t.TempDir(), "slipway")
	s, err := openState(root, "a")
	if err != nil {
		t.Fatal(err)
	}
	s.write("pid", []byte("1"))
	os.MkdirAll(s.file("deep/er"), 0o700)
	s.lock.Close()
	if names, _ := enginesIn(root); len(names) != 0 {
		t.Errorf("engines = %v", names)
	}
	if _, err := openState(root, "a"); !errors.Is(err, ErrEnding) {
		t.Errorf("open beside a guest = %v, want ErrEnding", err)
	}
	if _, err := os.Lstat(s.file("pid")); err != nil {
		t.Errorf("a directory whose guest has not ended was cleared: %v", err)
	}
	s.guest.Close()
	s, err = openState(root, "a")
	if err != nil {
		t.Fatal(err)
	}
	entries, _ := os.ReadDir(s.path)
	if len(entries) != 2 || entries[0].Name() != "guest" || entries[1].Name() != "lock" {
		t.Errorf("left: %v", entries)
	}
	s.Close()
}

func TestStateDirNotOurs(t *testing.T) {
	tests := []struct {
		name string
		make func(root string)
		want error
	}{
		{"root open to others", func(r string) { os.Mkdir(r, 0o700); os.Chmod(r, 0o755) }, ErrNotOurs},
		{"root is a file", func(r string) { os.WriteFile(r, nil, 0o600) }, ErrNotOurs},
		{"root is a link", func(r string) { os.Symlink(filepath.Dir(r), r) }, ErrNotOurs},
		{"engine is a link", func(r string) { os.Mkdir(r, 0o700); os.Symlink("/", filepath.Join(r, "a")) }, ErrNotOurs},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			root := filepath.Join(t.TempDir(), "slipway")
			tt.make(root)
			if _, err := openState(root, "a"); !errors.Is(err, tt.want) {
				t.Errorf("open = %v, want %v", err, tt.want)
			}
			if err := checkRoot(root); tt.name != "engine is a link" && !errors.Is(err, tt.want) {
				t.Errorf("check = %v, want %v", err, tt.want)
			}
		})
	}
	for _, name := range []string{"", ".", "..", "a/b", "-a", "a b", string(make([]byte, 33))} {
		if _, err := openState(t.TempDir(), name); !errors.Is(err, ErrName) {
			t.Errorf("name %q: %v", name, err)
		}
	}
}

// Many starts and stops of one name at a time: exactly one holds it at any moment.
func TestStateDirRace(t *testing.T) {
	root := filepath.Join(t.TempDir(), "slipway")
	var wg sync.WaitGroup
	var mu sync.Mutex
	opened := 0
	for range 8 {
		wg.Go(func() {
			for range 50 {
				s, err := openState(root, "a")
				if errors.Is(err, ErrRunning) {
					continue
				}
				if err != nil {
					t.Error(err)
					return
				}
				if !mu.TryLock() {
					t.Error("two at a time")
					return
				}
				opened++
				mu.Unlock()
				if err := s.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if opened == 0 {
		t.Error("nobody got it")
	}
}
