package netstack

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/slipway-net/slipway/internal/flow"
)

// A guest's repetitions keep its dial alive; their absence ends it.
func TestGuestGivesUp(t *testing.T) {
	tests := []struct {
		name string
		syns []time.Duration // when the guest sends a SYN
		want time.Duration   // when it is called gone, at the sweep after
	}{
		{"no repetition", []time.Duration{0}, 3 * time.Second},
		{"doubling", []time.Duration{0, 1 * time.Second, 3 * time.Second, 7 * time.Second}, 7*time.Second + 16*time.Second},
		{"linear as in Linux 6.5", []time.Duration{0, 1 * time.Second, 2 * time.Second, 3 * time.Second}, 3*time.Second + 4*time.Second},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var ds dials
				ds.init(10)
				ctx, cancel := context.WithCancel(context.Background())
				gone := 0
				go ds.sweepLoop(ctx, func() { gone++ })
				tuple := flow.Tuple{Proto: flow.TCP, Guest: families[0].guest, Target: families[0].target}
				begin := time.Now()
				for _, at := range tt.syns {
					time.Sleep(at - time.Since(begin))
					ds.begin(tuple, make([]byte, 20), time.Now(), func(d *dial) { d.ctx, d.cancel = context.WithCancel(ctx) })
				}
				d := ds.get(tuple)
				<-d.ctx.Done()
				if got := time.Since(begin); got < tt.want || got > tt.want+2*sweepEvery {
					t.Errorf("called gone after %v, want %v", got, tt.want)
				}
				cancel()
				synctest.Wait()
				if gone != 1 {
					t.Errorf("counted %d times", gone)
				}
				ds.end(tuple)
				if ds.len() != 0 || len(ds.guests) != 0 {
					t.Error("not forgotten")
				}
			})
		})
	}
}
