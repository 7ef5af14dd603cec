package nsagent

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// The tables are owned (NFT_TABLE_F_OWNER, Linux 5.12) by a netlink socket that nobody
// but the daemon holds once the guest is ready: a `flush ruleset` in the guest passes
// them by, nobody else can change them, and they go when the daemon does, whatever ended
// it. A listener that nobody serves must not take SYNs. Older kernels get ordinary
// tables, see repair_linux.go.

// foreignTableLimit is how long we wait for a table of our name to go, in a namespace
// that is not ours: the daemon that owned it may have been killed a moment ago.
const (
	foreignTableLimit = 500 * time.Millisecond
	foreignTablePoll  = 20 * time.Millisecond
)

// tables are ours in the guest's namespace.
type tables struct {
	nft    *nftSocket
	owned  bool
	loaded []loadedTable
	// repairs keeps them where they are not owned, or is nil.
	repairs *repairer
}

// loadedTable is one of them.
type loadedTable struct {
	f      nftFamily
	chains []nftChain
}

// tablePart are chains of a table that are of use without those of later parts.
type tablePart struct {
	chains  []nftChain
	instead []nftChain // to be tried if they cannot be loaded, or nil
	why     *string    // receives why they could not be loaded
}

// loadTables loads the identity SNAT, if it is asked for, and what the kernel path needs
// in the families that have a listener. It reports what did not work.
func (g *guest) loadTables(r *Report, k *kernelPath) {
	if !g.spec.IdentitySNAT && !k.on() {
		return
	}
	nft, err := openNFT()
	if err != nil {
		why := fmt.Sprintf("open nftables: %v", err)
		if g.spec.IdentitySNAT {
			r.SNAT = why
		}
		if k.on() {
			r.Kernel = why
		}
		return
	}
	g.tables = &tables{nft: nft, owned: true}
	if g.noOwner {
		g.disown()
	}
	g.loadTable(nftIPv4, g.parts(nftIPv4, k.ip4.listen, r, &r.Kernel))
	if r.Kernel != "" {
		k.ip6.listen = netip.AddrPort{}
	}
	if r.IPv6 == "" {
		g.loadTable(nftIPv6, g.parts(nftIPv6, k.ip6.listen, r, &r.Kernel6))
	}
}

// parts returns what a family's table is made of.
func (g *guest) parts(f nftFamily, listen netip.AddrPort, r *Report, why *string) []tablePart {
	var parts []tablePart
	if g.spec.IdentitySNAT {
		parts = append(parts, tablePart{[]nftChain{f.identityChain(g.spec.TUN.Name)}, nil, &r.SNAT})
	}
	if listen.IsValid() {
		tun := g.spec.TUN.Name
		parts = append(parts, tablePart{
			chains:  f.kernelChains(tun, listen, labelTags()),
			instead: f.kernelChains(tun, listen, markTags()),
			why:     why,
		})
	}
	return parts
}

// loadTable loads as many of the parts as can be, in their order.
func (g *guest) loadTable(f nftFamily, parts []tablePart) {
	t := g.tables
	deadline := time.Now().Add(foreignTableLimit)
	for len(parts) > 0 {
		part, err := t.load(f, parts)
		switch {
		case err == nil:
			l := loadedTable{f: f}
			for _, p := range parts {
				l.chains = append(l.chains, p.chains...)
			}
			t.loaded = append(t.loaded, l)
			return
		case part < 0 && t.owned && (errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP)):
			g.disown()
			continue
		case part < 0 && t.foreign(f, err):
			if t.removeStale(f) {
				continue
			}
			if g.spec.Join != nil && time.Now().Before(deadline) {
				time.Sleep(foreignTablePoll)
				continue
			}
			err = fmt.Errorf("table %s %s exists already", f.name, nftTable)
		case part >= 0 && parts[part].instead != nil:
			p := &parts[part]
			p.chains, p.instead = p.instead, nil
			continue
		default:
			err = fmt.Errorf("load nftables for %s: %w", f.words, err)
		}
		part = max(part, 0)
		for _, p := range parts[part:] {
			if *p.why == "" {
				*p.why = err.Error()
			}
		}
		parts = parts[:part]
	}
}

// disown makes do without owners, which the kernel does not know of. It costs only the
// repair if that cannot be had.
func (g *guest) disown() {
	g.tables.owned = false
	if err := g.watchTables(); err != nil {
		g.logf("watch nftables", "table "+nftTable, err)
	}
}

// load makes a family's table. With an error it says in which of the parts that was, or
// -1 for the table itself; nothing is loaded then.
func (t *tables) load(f nftFamily, parts []tablePart) (int, error) {
	m, err := newTable(f.family, nftTable, t.owned)
	if err != nil {
		return -1, err
	}
	batch, of := []nftMessage{m}, []int{-1}
	for i, p := range parts {
		for _, c := range p.chains {
			c.comment = t.comment()
			list, err := c.messages(f.family, nftTable)
			if err != nil {
				return i, err
			}
			for _, m := range list {
				batch, of = append(batch, m), append(of, i)
			}
		}
	}
	err = t.nft.send(batch)
	var refused *nftError
	if errors.As(err, &refused) && refused.index >= 0 {
		return of[refused.index], err
	}
	return -1, err
}

// foreign tells whether err is about a table of our name that is not ours. One that
// another socket owns is nobody's to create, which the kernel calls EPERM.
func (t *tables) foreign(f nftFamily, err error) bool {
	if errors.Is(err, unix.EPERM) {
		has, err := t.nft.hasTable(f.family, nftTable)
		return err == nil && has
	}
	return errors.Is(err, unix.EEXIST)
}

// staleComment marks rules that stay when an agent is killed, for the next one.
const staleComment = "made by slipway"

// comment is that of each rule.
func (t *tables) comment() string {
	if t.owned {
		return "" // they never stay
	}
	return staleComment
}

// removeStale removes a table that an agent which was killed has left.
func (t *tables) removeStale(f nftFamily) bool {
	if t.owned {
		return false
	}
	ours, err := t.nft.allRulesHave(f.family, nftTable, staleComment)
	if err != nil || !ours {
		return false
	}
	m, err := delTable(f.family, nftTable)
	return err == nil && t.nft.send([]nftMessage{m}) == nil
}

// owner returns the socket that owns the tables, for the daemon, or nil if there is
// none. The caller owns it, and the tables are no longer ours then.
func (t *tables) owner() *os.File {
	if t == nil || !t.owned || len(t.loaded) == 0 {
		return nil
	}
	f := os.NewFile(uintptr(t.nft.fd), "nftables")
	t.nft = nil
	return f
}
