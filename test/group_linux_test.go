package test

import (
	"io"
	"os/exec"
	"sync"
	"testing"
)

// group is the goroutines and connections of a test's server. At the end of the
// test everything is closed first and waited for then.
type group struct {
	sync.WaitGroup
	mu   sync.Mutex
	open []io.Closer // guarded by mu
	over bool        // guarded by mu
}

func newGroup(t testing.TB, closers ...io.Closer) *group {
	g := &group{open: closers}
	t.Cleanup(func() {
		g.mu.Lock()
		g.over = true
		for _, c := range g.open {
			c.Close()
		}
		g.mu.Unlock()
		g.Wait()
	})
	return g
}

// add takes c into care; it is closed at once if the test is over.
func (g *group) add(c io.Closer) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.over {
		c.Close()
		return
	}
	g.open = append(g.open, c)
}

func lookPath(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		missing(t, "command %s", name)
	}
	return path
}
