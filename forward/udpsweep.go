package forward

import (
	"sync"
	"time"
)

// sweeper looks for idle flows from time to time, as long as there are any.
type sweeper struct {
	wake chan struct{} // there may be flows
	done chan struct{} // closed by stop
	loop sync.WaitGroup
}

// start calls sweep after every interval until it says that nothing is left, and
// again after notify.
func (s *sweeper) start(every time.Duration, sweep func(now time.Time) (left int)) {
	s.wake, s.done = make(chan struct{}, 1), make(chan struct{})
	s.loop.Go(func() {
		for {
			select {
			case <-s.wake:
			case <-s.done:
				return
			}
			for left := 1; left > 0; {
				select {
				case <-time.After(every):
					left = sweep(time.Now())
				case <-s.done:
					return
				}
			}
		}
	})
}

// notify says that there is a new flow. It does not block.
func (s *sweeper) notify() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// stop ends the sweeper and waits for it. It is called once.
func (s *sweeper) stop() {
	close(s.done)
	s.loop.Wait()
}
