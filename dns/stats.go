package dns

import "sync/atomic"

// Stats are a Server's counters since its start, and how much it is doing now.
type Stats struct {
	Queries    uint64 `json:"queries"`     // messages from the guest that were queries
	Malformed  uint64 `json:"malformed"`   // dropped, or answered FORMERR
	BuiltIn    uint64 `json:"built_in"`    // answered here
	Upstream   uint64 `json:"upstream"`    // answered by an upstream
	Failed     uint64 `json:"failed"`      // SERVFAIL: no upstream answered
	Refused    uint64 `json:"refused"`     // REFUSED: too many queries at one time
	Tries      uint64 `json:"tries"`       // messages sent upstream
	Mismatched uint64 `json:"mismatched"`  // ignored: not the answer to what we asked
	Truncated  uint64 `json:"truncated"`   // sent to the guest with the TC bit
	StreamsCut uint64 `json:"streams_cut"` // TCP connections closed at once: too many

	InFlight int `json:"in_flight"` // queries being asked upstream now
	Streams  int `json:"streams"`   // TCP connections from the guest now
}

type counters struct {
	queries, malformed, builtIn, upstream, failed, refused atomic.Uint64
	tries, mismatched, truncated, streamsCut               atomic.Uint64
}

// Stats returns the counters. It may be called at any time.
func (s *Server) Stats() Stats {
	c := &s.count
	return Stats{
		Queries:    c.queries.Load(),
		Malformed:  c.malformed.Load(),
		BuiltIn:    c.builtIn.Load(),
		Upstream:   c.upstream.Load(),
		Failed:     c.failed.Load(),
		Refused:    c.refused.Load(),
		Tries:      c.tries.Load(),
		Mismatched: c.mismatched.Load(),
		Truncated:  c.truncated.Load(),
		StreamsCut: c.streamsCut.Load(),
		InFlight:   s.queries.inUse(),
		Streams:    s.streams.inUse(),
	}
}
