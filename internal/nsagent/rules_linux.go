package nsagent

import (
	"encoding/binary"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// The rules of the guest's namespace, one table for each of the two families:
//
//	table ip slipway {
//		chain raw {
//			type filter hook prerouting priority raw
//			iifname TUN tcp flags & (fin | syn | rst | ack) == syn \
//				fib daddr type != local fib saddr oifname != TUN notrack
//		}
//		chain prerouting {
//			type filter hook prerouting priority -90
//			iif lo accept
//			meta mark & 0x1000 == 0x1000 meta mark set meta mark & 0xffffefff
//			iifname TUN tcp flags & (fin | syn | rst | ack) == syn \
//				fib daddr type != local fib saddr oifname != TUN \
//				tproxy to GATEWAY:PORT meta mark set meta mark | 0x1000 accept
//			iifname TUN tcp flags & (fin | syn | rst | ack) != syn socket transparent 1 ct label set 124
//			tcp flags & syn == 0 ct direction reply ct label 125 meta mark set meta mark | 0x1000 accept
//			daddr GATEWAY tcp flags & (syn | ack) == syn | ack ct direction reply ct label 125 \
//				meta mark set meta mark | 0x1000 accept
//			tcp flags & syn == 0 socket transparent 1 meta mark set meta mark | 0x1000
//		}
//		chain output {
//			type route hook output priority -90
//			daddr GATEWAY meta mark & 0x10000000 == 0x10000000 accept
//			saddr GATEWAY tcp flags & syn == 0 meta mark & 0x1000 == 0 accept
//			meta mark & 0x1000 == 0x1000 meta mark set meta mark & 0xffffefff
//			tcp flags & (fin | syn | rst | ack) != syn ct direction original ct label 124 \
//				meta mark set meta mark | 0x1000 accept
//			oif lo tcp flags & (syn | ack) == syn | ack fib saddr type != local ct label set 124
//			saddr GATEWAY tcp flags & (fin | syn | rst | ack) == syn ct label set 125
//			tcp flags & syn == 0 ct direction original ct label not 125 fib saddr type != local ct label set 125
//			tcp flags & syn == 0 ct direction reply ct label 125 meta mark set meta mark | 0x1000 accept
//			daddr GATEWAY tcp flags & (syn | ack) == syn | ack ct direction reply ct label 125 \
//				meta mark set meta mark | 0x1000 accept
//		}
//		chain identity {
//			type nat hook postrouting priority 90
//			oifname TUN snat to ip saddr
//		}
//	}
//
// A guest's SYN has passed all of the guest's own rules when it leaves by the TUN. The
// daemon writes the same packet back into the TUN once it has connected the target, and
// the chain prerouting hands it to our listener. Nothing but a SYN to somebody who is
// not here is ever taken: what is for a local address (a published port, say) goes on as
// it is. It is not tracked again, because after a DNAT it would clash with the reply
// direction of the entry it made on its way out.
//
// The packets that follow are told by the socket they belong to (of a container, which
// come in by a bridge), or by a label of the connection (of processes in the namespace
// itself, whose packets pass no prerouting before they are routed); either way a bit of
// the packet's mark has a rule of ip-rule(8) keep them here. The label is set by the
// listener's own SYN-ACK. No other bit of the mark is touched: kube-proxy and others have
// theirs. The connection's mark has room for a bit of ours, too, but guests set it as a
// whole (CONNMARK --save-mark and --set-mark do so), and the connection would be lost;
// labels are only ever added. Kernels without labels get the bit in the mark.
//
// A SYN that comes in by the TUN from somebody whose packets would leave by it is no
// guest's: it is the client of a published port, and goes where it wants to.
//
// The other direction, a connection that the daemon makes to a published port with a
// transparent socket of the namespace, begins with a SYN from the gateway's address in
// OUTPUT, the one place where no packet of the wire is. It gets a label of its own. The
// answers of a process here leave by OUTPUT and of a container by PREROUTING; their
// socket is not found there where the guest's DNAT has led the connection elsewhere.
// The SYN also has a mark, which a server's socket here takes over from it
// (net.ipv4.tcp_fwmark_accept, in a namespace of our own): it has a rule of ip-rule(8)
// route all answers to loopback at once. To route each again for the label, when it had
// been routed to the device, cost a fifth of the bulk to clients; and with the route come
// segments as long as loopback's. Our listener has that mark, too: else its sockets would
// take over the bit of the SYNs that are handed to it.
//
// A label has also a client whose handshake came in by the TUN (stack/kernel, Enter), when a socket
// has taken its place: its first packet in OUTPUT is none of a handshake, and comes from
// an address that is not local. No forwarded packet passes OUTPUT, and of a guest's own
// socket with such an address the answers are to stay here, too. The look at the
// addresses is for packets without the label only. A SYN-ACK to such a client leaves
// by the TUN in any case: a label, or a socket in TIME_WAIT, would be an older
// connection's. To the gateway it stays.
//
// What comes in by loopback has been routed already when it was sent.
//
// The chains come after connection tracking and DNAT (priorities -200 and -100), so that
// they see the addresses that the guest's rules chose.
//
// identity is for all flows: the guest's own MASQUERADE rules (Docker's for each bridge,
// priority 100) would give all containers the address of the TUN. A nat chain that runs
// before them and maps each source to itself settles the matter for the whole connection;
// an accept would not, as the next chain is asked all the same. It changes nothing for
// anybody else.
const (
	nftTable = "slipway"
	// identityPriority is before srcnat, 100.
	identityPriority = 90
	// rawPriority is before connection tracking, -200; as iptables -t raw has it.
	rawPriority = -300
	// steerPriority is behind DNAT, -100.
	steerPriority = -90
)

// KernelMark is the bit of packet marks in the guest's namespace that keeps packets of
// the kernel path there.
const KernelMark = 0x1000

// gatewayMark is the bit of packet marks of connections from the gateway's address; it
// has TCP packets to that address, and a port of such a connection, stay in the namespace. Rules of guests look
// at the lower bits: CNI's and netavark's masquerade what has 0x2000, kube-proxy's what
// has 0x4000.
const gatewayMark = 0x10000000

// inboundMark is the bit of connection marks that stands for label 125 where there are
// none. No packet ever has it.
const inboundMark = 0x2000

// The labels of connections, of 128: of those that the guest began, and of those to its
// published ports.
const (
	labelOutbound = 124
	labelInbound  = 125
)

// connTag is what tells a connection of the kernel path: how it is seen, seen not to be there,
// and set.
type connTag struct{ has, hasNot, set []expr.Any }

// connTags are those of connections that the guest began, and of those to its ports.
type connTags struct{ outbound, inbound connTag }

// labelTags and markTags are the two ways.
func labelTags() connTags { return connTags{labelTag(labelOutbound), labelTag(labelInbound)} }
func markTags() connTags  { return connTags{markTag(KernelMark), markTag(inboundMark)} }

func labelTag(n int) connTag {
	label := labelBits(n)
	none := make([]byte, len(label))
	bit := []expr.Any{
		&expr.Ct{Key: expr.CtKeyLABELS, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: uint32(len(none)), Mask: label, Xor: none},
	}
	return connTag{
		has:    join(bit, &expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: none}),
		hasNot: join(bit, equal(none)),
		set: []expr.Any{
			&expr.Immediate{Register: 1, Data: label},
			&expr.Ct{Key: expr.CtKeyLABELS, Register: 1, SourceRegister: true},
		},
	}
}

// labelBits is one label as the kernel has it (struct nf_conn_labels).
func labelBits(n int) []byte {
	words := [2]uint64{}
	words[n/64] = 1 << (n % 64)
	return binary.NativeEndian.AppendUint64(binary.NativeEndian.AppendUint64(nil, words[0]), words[1])
}

func markTag(bit uint32) connTag {
	is := []expr.Any{&expr.Ct{Key: expr.CtKeyMARK, Register: 1}, masked(bit, 0)}
	return connTag{
		has:    join(is, equal(host32(bit))),
		hasNot: join(is, equal(host32(0))),
		set: []expr.Any{
			&expr.Ct{Key: expr.CtKeyMARK, Register: 1}, masked(^bit, bit),
			&expr.Ct{Key: expr.CtKeyMARK, Register: 1, SourceRegister: true},
		},
	}
}

// TCP flags, RFC 9293 section 3.1, and where they are in the header.
const (
	tcpFlagsOffset = 13
	tcpFIN         = 0x01
	tcpSYN         = 0x02
	tcpRST         = 0x04
	tcpACK         = 0x10
)

// nftFamily is a family's table and what differs in its rules.
type nftFamily struct {
	family   nftables.TableFamily
	name     string // as nft has it
	words    string // for people
	srcStart uint32 // of the source address in the packet, in bytes
	addrLen  uint32
}

// RFC 791 section 3.1, RFC 8200 section 3.
var (
	nftIPv4 = nftFamily{nftables.TableFamilyIPv4, "ip", "IPv4", 12, 4}
	nftIPv6 = nftFamily{nftables.TableFamilyIPv6, "ip6", "IPv6", 8, 16}
)

// identityChain keeps the sources of what leaves by the device tun.
func (f nftFamily) identityChain(tun string) nftChain {
	return nftChain{"identity", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, identityPriority, [][]expr.Any{
		join(device(expr.MetaKeyOIFNAME, tun),
			f.source(), &expr.NAT{Type: expr.NATTypeSourceNAT, Family: uint32(f.family), RegAddrMin: 1},
		),
	}, ""}
}

// kernelChains steer TCP into the listener at the address listen, which is of the family
// and the gateway's.
func (f nftFamily) kernelChains(tun string, listen netip.AddrPort, tags connTags) []nftChain {
	const all = tcpFIN | tcpSYN | tcpRST | tcpACK
	begins, goesOn := tcpFlags(all, expr.CmpOpEq, tcpSYN), tcpFlags(all, expr.CmpOpNeq, tcpSYN)
	syn := join(device(expr.MetaKeyIIFNAME, tun), begins, elsewhere(expr.Fib{FlagDADDR: true}), notFrom(tun))
	later := tcpFlags(tcpSYN, expr.CmpOpEq, 0)
	answers := join(later, direction(1), tags.inbound.has, setMark(), accept())
	connects := join(f.destination(), equal(listen.Addr().AsSlice()), tcpFlags(tcpSYN|tcpACK, expr.CmpOpEq, tcpSYN|tcpACK),
		direction(1), tags.inbound.has, setMark(), accept())
	return []nftChain{
		{"raw", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, rawPriority, [][]expr.Any{
			join(syn, &expr.Notrack{}),
		}, ""},
		{"prerouting", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, steerPriority, [][]expr.Any{
			join(&expr.Meta{Key: expr.MetaKeyIIF, Register: 1}, equal(host32(loopback)), accept()),
			clearMark(),
			join(syn, f.tproxy(listen), setMark(), accept()),
			// The daemon gives back what came out although it should not: conntrack had
			// forgotten the label.
			join(device(expr.MetaKeyIIFNAME, tun), goesOn, ofTransparent(), tags.outbound.set),
			answers,
			connects,
			join(later, ofTransparent(), setMark()),
		}, ""},
		{"output", nftables.ChainTypeRoute, nftables.ChainHookOutput, steerPriority, [][]expr.Any{
			join(f.destination(), equal(listen.Addr().AsSlice()), marked(gatewayMark), accept()),
			join(f.source(), equal(listen.Addr().AsSlice()), later, unmarked(KernelMark), accept()),
			clearMark(),
			// A SYN begins a new connection, even where conntrack takes it for the
			// next one of an entry that a target's RST has closed.
			join(goesOn, direction(0), tags.outbound.has, setMark(), accept()),
			join(&expr.Meta{Key: expr.MetaKeyOIF, Register: 1}, equal(host32(loopback)),
				tcpFlags(tcpSYN|tcpACK, expr.CmpOpEq, tcpSYN|tcpACK), elsewhere(expr.Fib{FlagSADDR: true}),
				tags.outbound.set),
			join(f.source(), equal(listen.Addr().AsSlice()), begins, tags.inbound.set),
			join(later, direction(0), tags.inbound.hasNot, elsewhere(expr.Fib{FlagSADDR: true}), tags.inbound.set),
			answers,
			connects,
		}, ""},
	}
}

// source puts the packet's source address into register 1.
func (f nftFamily) source() *expr.Payload { return f.address(f.srcStart) }

// destination does so with the destination, which follows it.
func (f nftFamily) destination() *expr.Payload { return f.address(f.srcStart + f.addrLen) }

func (f nftFamily) address(start uint32) *expr.Payload {
	return &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: start, Len: f.addrLen}
}

// tproxy hands a packet to the socket at the address listen.
func (f nftFamily) tproxy(listen netip.AddrPort) []expr.Any {
	return []expr.Any{
		&expr.Immediate{Register: 1, Data: listen.Addr().AsSlice()},
		&expr.Immediate{Register: 2, Data: binary.BigEndian.AppendUint16(nil, listen.Port())},
		&expr.TProxy{Family: byte(f.family), TableFamily: byte(f.family), RegAddr: 1, RegPort: 2},
	}
}

// join makes one rule of expressions and lists of them.
func join(parts ...any) []expr.Any {
	var rule []expr.Any
	for _, p := range parts {
		switch p := p.(type) {
		case []expr.Any:
			rule = append(rule, p...)
		case expr.Any:
			rule = append(rule, p)
		}
	}
	return rule
}

// device matches the name of a device.
func device(key expr.MetaKey, name string) []expr.Any {
	return []expr.Any{&expr.Meta{Key: key, Register: 1}, equal(deviceName(name))}
}

// deviceName is a name as the kernel has it.
func deviceName(name string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return b
}

// notFrom matches unless packets to the source address would leave by the device.
func notFrom(tun string) []expr.Any {
	return []expr.Any{
		&expr.Fib{Register: 1, FlagSADDR: true, ResultOIFNAME: true},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: deviceName(tun)},
	}
}

// direction matches packets of one direction of their connection: 0 is the original, 1
// the reply.
func direction(d byte) []expr.Any {
	return []expr.Any{&expr.Ct{Key: expr.CtKeyDIRECTION, Register: 1}, equal([]byte{d})}
}

// ofTransparent matches packets whose socket here is a transparent one.
func ofTransparent() []expr.Any {
	return []expr.Any{&expr.Socket{Key: expr.SocketKeyTransparent, Register: 1}, equal([]byte{1})}
}

func isTCP() []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, equal([]byte{unix.IPPROTO_TCP})}
}

// tcpFlags matches TCP packets by some of their flags.
func tcpFlags(mask byte, op expr.CmpOp, flags byte) []expr.Any {
	return join(isTCP(),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: tcpFlagsOffset, Len: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{mask}, Xor: []byte{0}},
		&expr.Cmp{Op: op, Register: 1, Data: []byte{flags}})
}

// elsewhere matches if the address that by selects is not one of the namespace.
func elsewhere(by expr.Fib) []expr.Any {
	by.Register, by.ResultADDRTYPE = 1, true
	return []expr.Any{&by, &expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: host32(unix.RTN_LOCAL)}}
}

// setMark sets our bit of the packet's mark.
func setMark() []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1}, withBit(),
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1, SourceRegister: true},
	}
}

// marked matches packets whose mark has the bit.
func marked(bit uint32) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyMARK, Register: 1}, masked(bit, 0), equal(host32(bit))}
}

// unmarked matches those whose mark has not.
func unmarked(bit uint32) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyMARK, Register: 1}, masked(bit, 0), equal(host32(0))}
}

// clearMark takes our bit from packets to which the guest's own rules gave it: they would
// be kept here.
func clearMark() []expr.Any {
	return join(marked(KernelMark),
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1}, masked(^uint32(KernelMark), 0),
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1, SourceRegister: true},
	)
}

// withBit sets our bit in register 1.
func withBit() *expr.Bitwise { return masked(^uint32(KernelMark), KernelMark) }

// masked keeps the bits of mask in register 1 and flips those of xor.
func masked(mask, xor uint32) *expr.Bitwise {
	return &expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: host32(mask), Xor: host32(xor)}
}

func accept() *expr.Verdict { return &expr.Verdict{Kind: expr.VerdictAccept} }

// equal compares register 1.
func equal(data []byte) *expr.Cmp { return &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: data} }

// host32 is a number as the kernel keeps marks and indices.
func host32(n uint32) []byte { return binary.NativeEndian.AppendUint32(nil, n) }
