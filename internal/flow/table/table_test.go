package table_test

import (
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/slipway-net/slipway/internal/flow"
	"github.com/slipway-net/slipway/internal/flow/table"
)

func newFlow(p flow.Proto, port uint16) *flow.Flow {
	return &flow.Flow{Tuple: flow.Tuple{
		Proto:  p,
		Guest:  netip.AddrPortFrom(netip.MustParseAddr("192.168.65.3"), port),
		Target: netip.MustParseAddrPort("198.51.100.7:443"),
	}}
}

func TestSnapshotIsNewestFirst(t *testing.T) {
	tab := table.New()
	for port := range uint16(100) {
		tab.Open(newFlow(flow.TCP, port))
	}
	got := tab.Snapshot()
	if len(got) != 100 {
		t.Fatalf("%d flows, want 100", len(got))
	}
	for i, f := range got {
		if want := uint16(99 - i); f.Tuple.Guest.Port() != want {
			t.Fatalf("flow %d is from port %d, want %d", i, f.Tuple.Guest.Port(), want)
		}
		if f.Started.IsZero() {
			t.Fatalf("flow %d has no starting time", i)
		}
		if tab.Get(f.ID) != f {
			t.Fatalf("Get(%d) is another flow", f.ID)
		}
	}
}

func TestOpenKeepsStarted(t *testing.T) {
	tab, f := table.New(), newFlow(flow.UDP, 1)
	f.Started = time.Unix(1, 0)
	tab.Open(f)
	if !f.Started.Equal(time.Unix(1, 0)) {
		t.Errorf("Started became %v", f.Started)
	}
}

func TestCloseSumsUp(t *testing.T) {
	tab := table.New()
	a, b, c := newFlow(flow.TCP, 1), newFlow(flow.TCP, 2), newFlow(flow.UDP, 3)
	for _, f := range []*flow.Flow{a, b, c} {
		tab.Open(f)
		f.ToHost.Add(10)
		f.ToGuest.Add(1)
	}
	tab.Close(a)
	tab.Close(a) // counts once

	if a.State() != flow.Closed {
		t.Errorf("closed flow is %v", a.State())
	}
	if tab.Get(a.ID) != nil {
		t.Error("closed flow is still in the table")
	}
	one := table.Count{Flows: 1, ToHostBytes: 10, ToGuestBytes: 1}
	if got := tab.Ended(flow.TCP); got != one {
		t.Errorf("ended tcp %+v, want %+v", got, one)
	}
	if got := tab.Live(flow.TCP); got != one {
		t.Errorf("live tcp %+v, want %+v", got, one)
	}
	if got := tab.Ended(flow.UDP); got != (table.Count{}) {
		t.Errorf("ended udp %+v, want none", got)
	}
	if tab.Len() != 2 {
		t.Errorf("%d live flows, want 2", tab.Len())
	}
}

func TestCloseOfAStranger(t *testing.T) {
	tab := table.New()
	tab.Open(newFlow(flow.TCP, 1))
	stranger := newFlow(flow.TCP, 2)
	stranger.ID = 1 // the same number, another flow
	tab.Close(stranger)
	if tab.Len() != 1 || tab.Ended(flow.TCP).Flows != 0 {
		t.Errorf("closing a flow that is not in the table changed it: %d live, %+v ended", tab.Len(), tab.Ended(flow.TCP))
	}
}

func TestStates(t *testing.T) {
	tab := table.New()
	for i, s := range []flow.State{flow.Dialling, flow.Open, flow.Open, flow.HalfOpen} {
		f := newFlow(flow.TCP, uint16(i))
		f.SetState(s)
		tab.Open(f)
	}
	got := tab.States(flow.TCP)
	if got[flow.Dialling] != 1 || got[flow.Open] != 2 || got[flow.HalfOpen] != 1 || len(got) != 3 {
		t.Errorf("states %v", got)
	}
}

func TestUnknownProto(t *testing.T) {
	tab := table.New()
	f := newFlow(flow.Proto(200), 1)
	tab.Open(f)
	tab.Close(f)
	if tab.Len() != 0 || tab.Ended(200) != (table.Count{}) {
		t.Error("an unknown kind of flow was counted as a known one")
	}
}

func TestConcurrent(t *testing.T) {
	tab := table.New()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for port := range uint16(500) {
				f := newFlow(flow.TCP, port)
				tab.Open(f)
				f.ToHost.Add(1)
				tab.Close(f)
			}
		})
		wg.Go(func() {
			for range 50 {
				tab.Snapshot()
				tab.States(flow.TCP)
			}
		})
	}
	wg.Wait()
	want := table.Count{Flows: 4000, ToHostBytes: 4000}
	if got := tab.Ended(flow.TCP); got != want || tab.Len() != 0 {
		t.Errorf("ended %+v, %d live; want %+v and none", got, tab.Len(), want)
	}
}

func TestOpenCloseAllocates(t *testing.T) {
	tab, f := table.New(), newFlow(flow.TCP, 1)
	tab.Open(f)
	tab.Close(f)
	// The maps grow now and then while the ID moves on through the shards.
	if n := testing.AllocsPerRun(1000, func() { tab.Open(f); tab.Close(f) }); n >= 1 {
		t.Errorf("%.2f allocations for Open and Close", n)
	}
}

func BenchmarkOpenClose(b *testing.B) {
	tab := table.New()
	b.RunParallel(func(pb *testing.PB) {
		f := newFlow(flow.TCP, 1)
		for pb.Next() {
			tab.Open(f)
			tab.Close(f)
		}
	})
}
