package nsagent

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// The guest's own MASQUERADE rules (Docker's for each bridge, priority 100) would give
// all containers the address of the TUN. A nat chain that runs before them and maps
// each source to itself settles the matter for the whole connection; an accept would
// not, as the next chain is asked all the same. It changes nothing for anybody else.
//
// The tables are owned (NFT_TABLE_F_OWNER, Linux 5.12) by the agent's netlink socket:
// a `flush ruleset` in the guest passes them by, and they go with the agent, which
// matters in a namespace that is not ours. Older kernels get ordinary tables.
const (
	snatTable    = "slipway"
	snatChain    = "identity"
	snatPriority = 90 // before srcnat, 100
	// nftTableOwner is NFT_TABLE_F_OWNER of linux/netfilter/nf_tables.h.
	nftTableOwner = 2
	// nftTimeout bounds the wait for acknowledgements, which the kernel sends before
	// sendmsg returns, so it passes only when the kernel acts against the protocol.
	nftTimeout = 5 * time.Second
)

// snatFamily is one of the tables.
type snatFamily struct {
	table  *nftables.Table
	source *expr.Payload // the packet's source address
	words  string
}

func snatFamilies() []snatFamily {
	saddr := func(offset, size uint32) *expr.Payload {
		return &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: size}
	}
	return []snatFamily{ // RFC 791 section 3.1, RFC 8200 section 3
		{&nftables.Table{Name: snatTable, Family: nftables.TableFamilyIPv4}, saddr(12, 4), "IPv4"},
		{&nftables.Table{Name: snatTable, Family: nftables.TableFamilyIPv6}, saddr(8, 16), "IPv6"},
	}
}

// identitySNAT loads the chains, which stay as long as the agent.
func (g *guest) identitySNAT(r *Report) {
	var nl *netlink.Conn
	conn, err := nftables.New(nftables.AsLasting(), nftables.WithSockOptions(func(c *netlink.Conn) error {
		nl = c
		return c.SetDeadline(time.Now().Add(nftTimeout))
	}))
	if err != nil {
		r.SNAT = fmt.Sprintf("open nftables: %v", err)
		return
	}
	for _, f := range snatFamilies() {
		if f.table.Family == nftables.TableFamilyIPv6 && r.IPv6 != "" {
			continue
		}
		if err := g.loadSNAT(conn, nl, f); err != nil {
			r.SNAT = fmt.Sprintf("load nftables for %s: %v", f.words, err)
		}
	}
	g.nft = nl // the owner of the tables
}

// releaseSNAT lets our tables go, in a namespace of our own without waiting for it.
func (g *guest) releaseSNAT() {
	if g.nft == nil || g.spec.Join != nil {
		return // the end of the process does it
	}
	c, err := g.nft.SyscallConn()
	if err != nil {
		return
	}
	spare := -1
	c.Control(func(fd uintptr) { spare, _ = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0) })
	if spare < 0 {
		return
	}
	g.nft.Close()
	closeLater(spare)
}

// loadSNAT loads one table.
func (g *guest) loadSNAT(conn *nftables.Conn, nl *netlink.Conn, f snatFamily) error {
	err := ownTable(nl, f.table)
	switch {
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP):
		conn.AddTable(f.table)
		if g.spec.Join != nil {
			g.undo = append(g.undo, func() {
				nl.SetDeadline(time.Now().Add(nftTimeout))
				conn.DelTable(f.table)
				conn.Flush()
			})
		}
	case err != nil:
		return err
	}
	chain := conn.AddChain(&nftables.Chain{
		Name:     snatChain,
		Table:    f.table,
		Type:     nftables.ChainTypeNAT,
		Hooknum:  nftables.ChainHookPostrouting,
		Priority: nftables.ChainPriorityRef(snatPriority),
	})
	conn.AddRule(&nftables.Rule{Table: f.table, Chain: chain, Exprs: []expr.Any{
		&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: deviceName(g.spec.TUN.Name)},
		f.source,
		&expr.NAT{Type: expr.NATTypeSourceNAT, Family: uint32(f.table.Family), RegAddrMin: 1},
	}})
	return conn.Flush()
}

// ownTable adds a table that belongs to the socket nl. The nftables package cannot say
// so: it sends every table without flags.
func ownTable(nl *netlink.Conn, t *nftables.Table) error {
	attrs, err := netlink.MarshalAttributes([]netlink.Attribute{
		{Type: unix.NFTA_TABLE_NAME, Data: append([]byte(t.Name), 0)},
		{Type: unix.NFTA_TABLE_FLAGS, Data: binary.BigEndian.AppendUint32(nil, nftTableOwner)},
	})
	if err != nil {
		return err
	}
	message := func(typ, flags uint16, family byte, resource uint16, data []byte) netlink.Message {
		head := binary.BigEndian.AppendUint16([]byte{family, unix.NFNETLINK_V0}, resource)
		return netlink.Message{
			Header: netlink.Header{Type: netlink.HeaderType(typ), Flags: netlink.Request | netlink.HeaderFlags(flags)},
			Data:   append(head, data...),
		}
	}
	const newTable = unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_NEWTABLE
	_, err = nl.SendMessages([]netlink.Message{
		message(unix.NFNL_MSG_BATCH_BEGIN, 0, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES, nil),
		message(newTable, unix.NLM_F_ACK|unix.NLM_F_CREATE, byte(t.Family), 0, attrs),
		message(unix.NFNL_MSG_BATCH_END, 0, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES, nil),
	})
	if err != nil {
		return err
	}
	_, err = nl.Receive()
	return err
}

// deviceName is a device's name as rules compare it.
func deviceName(name string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return b
}
