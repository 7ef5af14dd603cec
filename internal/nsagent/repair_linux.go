package nsagent

import (
	"errors"
	"fmt"
	"sync"
	"syscall"
	"time"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Kernels before 5.12 know no owners, so anybody in the guest may flush our tables:
// `nft flush ruleset` is the first line of many a firewall script. There the agent listens
// to what the kernel tells of every change, and when somebody else has removed anything
// of our tables it makes them anew, in one transaction. What is added to them stays until
// then. The agent also removes them in the end, in a namespace that is not ours; if it is
// killed they stay, do nothing without a listener, and the next agent there removes them,
// which it tells from others by their comments.

const (
	// repairPause is between two repairs, so that somebody who flushes in a loop
	// costs little. The first one is not delayed.
	repairPause = 100 * time.Millisecond
	// repairRetry is after a repair that failed.
	repairRetry = time.Second
	// repairLog is the least time between two lines about it.
	repairLog = time.Minute
)

// repairer keeps tables in place that nobody owns.
type repairer struct {
	events *nftSocket
	self   uint32 // netlink port of the socket that makes our tables
	repair func() (uint64, error)
	logf   func(message, on string, err error)

	mu     sync.Mutex // guards the tables' socket and the fields below
	count  uint64
	closed bool
}

// watchTables subscribes to changes, before the tables are made.
func (g *guest) watchTables() error {
	t := g.tables
	self, err := t.nft.port()
	if err != nil {
		return err
	}
	events, err := openNFT()
	if err != nil {
		return err
	}
	err = unix.SetsockoptInt(events.fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, unix.NFNLGRP_NFTABLES)
	if err == nil { // a subscriber waits as long as it takes
		err = unix.SetsockoptTimeval(events.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{})
	}
	if err != nil {
		events.close()
		return err
	}
	t.repairs = &repairer{events: events, self: self, repair: g.repairTables, logf: g.logf}
	return nil
}

// keepTables puts the tables back whenever they were touched, until removeTables. It
// does nothing where they have an owner.
func (g *guest) keepTables() {
	if g.tables == nil || g.tables.repairs == nil || len(g.tables.loaded) == 0 {
		return
	}
	if g.spec.Join != nil {
		g.undo = append(g.undo, g.removeTables)
	}
	go g.tables.repairs.run() // ends with the process
}

// run repairs whenever something of ours was removed.
func (r *repairer) run() {
	var logged time.Time
	for {
		if err := r.await(); err != nil {
			r.logf("watch nftables", "table "+nftTable, err)
			return
		}
		for {
			n, err := r.repair()
			if n > 0 && time.Since(logged) > repairLog {
				logged = time.Now()
				r.logf("put the rules back", "table "+nftTable, err)
			}
			if err == nil {
				break
			}
			time.Sleep(repairRetry)
		}
		time.Sleep(repairPause)
	}
}

// await blocks until somebody else has removed anything of our tables, or may have. It
// returns at the end of that transaction, which may come in several datagrams.
func (r *repairer) await() error {
	for touched := false; ; {
		events, err := r.events.receive()
		switch {
		case errors.Is(err, unix.ENOBUFS): // events were lost
			return nil
		case err != nil:
			return err
		}
		for _, e := range events {
			switch {
			case e.Header.Type == unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_NEWGEN && touched:
				return nil
			case e.Header.Pid != r.self && removesOurs(e):
				touched = true
			}
		}
	}
}

// removesOurs tells whether an event is the removal of a table called ours, or of
// something in it.
func removesOurs(e syscall.NetlinkMessage) bool {
	switch e.Header.Type {
	case unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_DELTABLE,
		unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_DELCHAIN,
		unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_DELRULE:
	default:
		return false
	}
	if len(e.Data) < nfgenmsgLen || e.Data[0] != byte(nftables.TableFamilyIPv4) && e.Data[0] != byte(nftables.TableFamilyIPv6) {
		return false
	}
	attrs, err := netlink.UnmarshalAttributes(e.Data[nfgenmsgLen:])
	if err != nil {
		return false
	}
	for _, a := range attrs {
		// NFTA_TABLE_NAME, NFTA_CHAIN_TABLE and NFTA_RULE_TABLE are one number.
		if a.Type == unix.NFTA_TABLE_NAME {
			return unix.ByteSliceToString(a.Data) == nftTable
		}
	}
	return false
}

// repairTables makes the tables anew and returns how often it did.
func (g *guest) repairTables() (uint64, error) {
	t, r := g.tables, g.tables.repairs
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return 0, nil
	}
	for _, l := range t.loaded {
		if err := t.remake(l); err != nil {
			return r.count + 1, fmt.Errorf("for %s: %w", l.f.words, err)
		}
	}
	r.count++
	g.wire.send(event{Repairs: r.count})
	return r.count, nil
}

// remake replaces a table by what it should be, if it is there, or makes it.
func (t *tables) remake(l loadedTable) error {
	exists, err := newTable(l.f.family, nftTable, false)
	if err != nil {
		return err
	}
	exists.flags &^= unix.NLM_F_EXCL
	gone, err := delTable(l.f.family, nftTable)
	if err != nil {
		return err
	}
	batch := []nftMessage{exists, gone, exists}
	for _, c := range l.chains {
		c.comment = t.comment()
		list, err := c.messages(l.f.family, nftTable)
		if err != nil {
			return err
		}
		batch = append(batch, list...)
	}
	return t.nft.send(batch)
}

// removeTables ends it, and removes the tables that are still there.
func (g *guest) removeTables() {
	t, r := g.tables, g.tables.repairs
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = true
	for _, l := range t.loaded {
		if gone, err := delTable(l.f.family, nftTable); err == nil {
			t.nft.send([]nftMessage{gone})
		}
	}
}
