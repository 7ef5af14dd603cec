// Package table holds the live flows of one engine: who travels where, in which
// state, with how many bytes, and the sums over those that have ended.
//
// A forwarder calls Open when it takes a flow on and Close when the last byte has
// passed; anybody may read at any time. Limits are the forwarder's: the table
// takes whatever it is given.
package table

import (
	"cmp"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/slipway-net/slipway/internal/flow"
)

// Theory of operation.
//
// The relays count into the entries themselves, atomically and without knowing the
// table. The table is touched twice in the life of a flow, to add and to take out
// its entry, from as many goroutines as there are flows starting and ending; so the
// entries lie in shards of one mutex and one map each, chosen by the flow's number.
// Numbers are given in sequence, which spreads neighbours evenly and makes "newest
// first" a sort by number. A reader locks one shard after the other: what it sees
// is not one instant, but every flow that was open all the while is in it, once.

// shards is a power of two, so that the low bits of the ID choose. 16 is more than
// the CPUs that open flows at one time on the machines this is for.
const shards = 16

// protos is the number of kinds of flows, counting the invalid zero one, so that
// a flow.Proto is an index.
const protos = int(flow.Ping) + 1

// Table is the set of live flows. Its methods may be called by any number of
// goroutines; none of them blocks for longer than a map operation but Snapshot,
// Live and States, which visit every flow.
type Table struct {
	lastID atomic.Uint64
	shard  [shards]shard
	live   [protos]atomic.Int64
	ended  [protos]sums
}

// shard is one part of the entries. The padding keeps two shards' locks off one
// cache line (64 bytes on the machines we know).
type shard struct {
	mu    sync.Mutex // guards flows
	flows map[uint64]*flow.Flow
	_     [64 - 16]byte
}

// sums are what has been counted by flows that ended.
type sums struct {
	flows, toHostBytes, toGuestBytes atomic.Uint64
}

// New returns an empty table.
func New() *Table {
	t := new(Table)
	for i := range t.shard {
		t.shard[i].flows = make(map[uint64]*flow.Flow)
	}
	return t
}

// Open gives f its ID and, unless it has one, its starting time, and publishes it:
// from now on f's constant fields must not change. The table keeps f until Close.
func (t *Table) Open(f *flow.Flow) {
	f.ID = t.lastID.Add(1)
	if f.Started.IsZero() {
		f.Started = time.Now()
	}
	s := &t.shard[f.ID%shards]
	s.mu.Lock()
	s.flows[f.ID] = f
	s.mu.Unlock()
	t.live[index(f)].Add(1)
}

// Close moves f to flow.Closed, takes it out and adds its counters to Ended. What f
// counts afterwards is in no sum, so Close comes after the last byte. A flow that is
// not in the table is only marked: Close may be called more than once.
func (t *Table) Close(f *flow.Flow) {
	f.SetState(flow.Closed)
	s := &t.shard[f.ID%shards]
	s.mu.Lock()
	known := s.flows[f.ID] == f
	if known {
		delete(s.flows, f.ID)
	}
	s.mu.Unlock()
	if !known {
		return
	}
	p := index(f)
	t.live[p].Add(-1)
	t.ended[p].flows.Add(1)
	t.ended[p].toHostBytes.Add(f.ToHost.Bytes.Load())
	t.ended[p].toGuestBytes.Add(f.ToGuest.Bytes.Load())
}

// index is the flow's kind; one that does not exist is counted as the invalid one
// rather than trusted.
func index(f *flow.Flow) int {
	if int(f.Tuple.Proto) < protos {
		return int(f.Tuple.Proto)
	}
	return 0
}

// Get returns the live flow with the given ID, or nil.
func (t *Table) Get(id uint64) *flow.Flow {
	s := &t.shard[id%shards]
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.flows[id]
}

// Snapshot returns the live flows, newest first. The slice is the caller's; the
// flows are shared and go on counting.
func (t *Table) Snapshot() []*flow.Flow {
	all := make([]*flow.Flow, 0, t.Len())
	for i := range t.shard {
		s := &t.shard[i]
		s.mu.Lock()
		for _, f := range s.flows {
			all = append(all, f)
		}
		s.mu.Unlock()
	}
	slices.SortFunc(all, func(a, b *flow.Flow) int { return cmp.Compare(b.ID, a.ID) })
	return all
}

// Len is the number of live flows.
func (t *Table) Len() int {
	var n int64
	for i := range t.live {
		n += t.live[i].Load()
	}
	return int(max(n, 0)) // a Close may overtake its Open's count for a moment
}

// Count is how many flows there are of one kind, and what has passed in them.
// Bytes are payload bytes.
type Count struct {
	Flows        uint64 `json:"flows"`
	ToHostBytes  uint64 `json:"to_host_bytes"`
	ToGuestBytes uint64 `json:"to_guest_bytes"`
}

// Ended sums up the flows of kind p that are closed.
func (t *Table) Ended(p flow.Proto) Count {
	if int(p) >= protos {
		return Count{}
	}
	e := &t.ended[p]
	return Count{
		Flows:        e.flows.Load(),
		ToHostBytes:  e.toHostBytes.Load(),
		ToGuestBytes: e.toGuestBytes.Load(),
	}
}

// Live sums up the flows of kind p that are in the table.
func (t *Table) Live(p flow.Proto) Count {
	var c Count
	t.each(func(f *flow.Flow) {
		if f.Tuple.Proto == p {
			c.Flows++
			c.ToHostBytes += f.ToHost.Bytes.Load()
			c.ToGuestBytes += f.ToGuest.Bytes.Load()
		}
	})
	return c
}

// States counts the live flows of kind p by state.
func (t *Table) States(p flow.Proto) map[flow.State]int {
	n := make(map[flow.State]int)
	t.each(func(f *flow.Flow) {
		if f.Tuple.Proto == p {
			n[f.State()]++
		}
	})
	return n
}

// each calls do for every live flow, with the flow's shard locked.
func (t *Table) each(do func(*flow.Flow)) {
	for i := range t.shard {
		s := &t.shard[i]
		s.mu.Lock()
		for _, f := range s.flows {
			do(f)
		}
		s.mu.Unlock()
	}
}
