package daemon

import (
	"context"
	"fmt"
	"sync"
)

// services are the parts that run until the engine ends.
type services struct {
	ctx    context.Context // ends with stop; not with the caller's, for the guest is served while it ends
	cancel context.CancelFunc
	wg     sync.WaitGroup
	last   []func()
	once   sync.Once

	failed  chan struct{} // closed when the first part has ended by itself
	mu      sync.Mutex    // guards the fields below
	started int
	cause   error // of the part that was started first among those that failed
	causeNo int
	forgave bool // failing is no failure any more
}

func newServices(ctx context.Context) *services {
	s := &services{failed: make(chan struct{})}
	s.ctx, s.cancel = context.WithCancel(context.WithoutCancel(ctx))
	return s
}

// start runs one part, which blocks until its context ends and returns an error if
// and only if it ended before. Parts are started before those that need them.
func (s *services) start(name string, run func(context.Context) error) {
	s.mu.Lock()
	no := s.started
	s.started++
	s.mu.Unlock()
	s.wg.Go(func() {
		if err := run(s.ctx); err != nil {
			s.fail(no, fmt.Errorf("serve %s: %w", name, err))
		}
	})
}

// fail notes the end of a part. Where several fail, the one that the others need says
// why, even if it takes longer to end.
func (s *services) fail(no int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cause == nil {
		close(s.failed)
	}
	if s.cause == nil || no < s.causeNo {
		s.cause, s.causeNo = err, no
	}
}

// forgive makes err nil: what the parts serve has gone, and so they failed.
func (s *services) forgive() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.forgave = true
}

// err returns why a part failed, or nil; it is final after stop.
func (s *services) err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.forgave {
		return nil
	}
	return s.cause
}

// onStop registers what is to be called when every part has ended, the last first.
func (s *services) onStop(f func()) { s.last = append(s.last, f) }

// stop ends every part and waits for it. It may be called more than once.
func (s *services) stop() {
	s.once.Do(func() {
		s.cancel()
		s.wg.Wait()
		for i := len(s.last) - 1; i >= 0; i-- {
			s.last[i]()
		}
	})
}
