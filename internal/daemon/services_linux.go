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
	failed chan error // the first part that ended by itself
	last   []func()
	once   sync.Once
}

func newServices(ctx context.Context) *services {
	s := &services{failed: make(chan error, 1)}
	s.ctx, s.cancel = context.WithCancel(context.WithoutCancel(ctx))
	return s
}

// start runs one part, which blocks until its context ends and returns an error if
// and only if it ended before.
func (s *services) start(name string, run func(context.Context) error) {
	s.wg.Go(func() {
		err := run(s.ctx)
		if err == nil {
			return
		}
		select {
		case s.failed <- fmt.Errorf("serve %s: %w", name, err):
		default: // another failed first
		}
	})
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
