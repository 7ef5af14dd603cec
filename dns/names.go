package dns

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/miekg/dns"
)

const (
	// builtInTTL is how long the guest may remember a built-in name, in seconds.
	// The addresses last as long as the engine; a short time costs nothing and
	// spares a guest that moves to another engine.
	builtInTTL = 10

	// ownZone holds the names that a PTR answer prefers.
	ownZone = ".slipway.internal."
)

// nameTable knows the built-in names. It is constant after newNameTable.
type nameTable struct {
	addrs   map[string][]netip.Addr // by name as in query.name
	ptr     map[string]string       // reverse name as in query.name to the fqdn
	subnets []netip.Prefix
}

func newNameTable(names map[string][]netip.Addr, subnets []netip.Prefix) *nameTable {
	t := &nameTable{addrs: make(map[string][]netip.Addr), ptr: make(map[string]string)}
	for _, p := range subnets {
		t.subnets = append(t.subnets, p.Masked())
	}
	best := make(map[netip.Addr]string)
	for name, addrs := range names {
		name = dns.CanonicalName(name)
		key, ok := wireName(name)
		if !ok {
			continue
		}
		for _, a := range addrs {
			a = a.Unmap().WithZone("")
			if !slices.Contains(t.addrs[key], a) {
				t.addrs[key] = append(t.addrs[key], a)
			}
			if old, ok := best[a]; !ok || preferred(name, old) {
				best[a] = name
			}
		}
	}
	for a, name := range best {
		if reverse, err := dns.ReverseAddr(a.String()); err == nil {
			if key, ok := wireName(reverse); ok {
				t.ptr[key] = name
			}
		}
	}
	return t
}

// preferred says whether a is the better PTR answer than b.
func preferred(a, b string) bool {
	ownA, ownB := strings.HasSuffix(a, ownZone), strings.HasSuffix(b, ownZone)
	if ownA != ownB {
		return ownA
	}
	return a < b
}

// wireName returns a canonical name in wire form.
func wireName(name string) (string, bool) {
	var buf [maxNameLen + 1]byte
	n, err := dns.PackDomainName(name, buf[:], 0, nil, false)
	return string(buf[:n]), err == nil && n <= maxNameLen
}

// answer returns the answer to a query for a built-in name, at most size bytes
// long; ok is false if the query is not for one.
func (t *nameTable) answer(q *query, size int) (reply []byte, ok bool) {
	if opcode(q.msg) != dns.OpcodeQuery || q.name == "" || q.qclass != dns.ClassINET && q.qclass != dns.ClassANY {
		return nil, false
	}
	addrs, isName := t.addrs[q.name]
	target, isPTR := t.ptr[q.name]
	if !isName && !isPTR && !t.ownReverse(q.name) {
		return nil, false
	}
	m := new(dns.Msg)
	if m.Unpack(q.msg) != nil || len(m.Question) != 1 {
		return q.reply(rcodeFormatError), true
	}
	r := new(dns.Msg).SetReply(m)
	r.Authoritative, r.RecursionAvailable = true, true
	asked := m.Question[0]
	switch {
	case isName:
		r.Answer = addressRecords(asked, addrs)
	case isPTR && (asked.Qtype == dns.TypePTR || asked.Qtype == dns.TypeANY):
		r.Answer = []dns.RR{&dns.PTR{Hdr: header(asked.Name, dns.TypePTR), Ptr: target}}
	case !isPTR:
		r.Rcode = dns.RcodeNameError
	}
	if len(r.Answer) == 0 {
		r.Ns = []dns.RR{negative(asked.Name)}
	}
	if opt := m.IsEdns0(); opt != nil {
		r.SetEdns0(ourUDPSize, opt.Do())
		if opt.Version() != 0 { // RFC 6891 section 6.1.3
			r.Answer, r.Ns, r.Rcode = nil, nil, dns.RcodeBadVers
		}
	}
	r.Truncate(size)
	b, err := r.Pack()
	if err != nil {
		return q.reply(rcodeServerFailure), true
	}
	return b, true
}

// addressRecords answers A, AAAA and ANY; other types have no records.
func addressRecords(asked dns.Question, addrs []netip.Addr) []dns.RR {
	var rrs []dns.RR
	for _, a := range addrs {
		switch {
		case a.Is4() && (asked.Qtype == dns.TypeA || asked.Qtype == dns.TypeANY):
			rrs = append(rrs, &dns.A{Hdr: header(asked.Name, dns.TypeA), A: a.AsSlice()})
		case a.Is6() && (asked.Qtype == dns.TypeAAAA || asked.Qtype == dns.TypeANY):
			rrs = append(rrs, &dns.AAAA{Hdr: header(asked.Name, dns.TypeAAAA), AAAA: a.AsSlice()})
		}
	}
	return rrs
}

func header(name string, rrtype uint16) dns.RR_Header {
	return dns.RR_Header{Name: name, Rrtype: rrtype, Class: dns.ClassINET, Ttl: builtInTTL}
}

// negative is the SOA record that tells caches how long a name or type may be
// remembered as missing (RFC 2308 section 3). Each name is a zone of its own.
func negative(name string) dns.RR {
	return &dns.SOA{
		Hdr: header(name, dns.TypeSOA), Ns: "gateway.slipway.internal.", Mbox: "nobody.invalid.",
		Serial: 1, Refresh: 3600, Retry: 600, Expire: 86400, Minttl: builtInTTL,
	}
}

// ownReverse says whether name is the reverse name of an address in one of the
// guest's subnets.
func (t *nameTable) ownReverse(name string) bool {
	a, ok := reverseAddr(name)
	return ok && slices.ContainsFunc(t.subnets, func(p netip.Prefix) bool { return p.Contains(a) })
}

// reverseAddr is the inverse of dns.ReverseAddr, for complete addresses only.
// name is in lower-case wire form.
func reverseAddr(name string) (netip.Addr, bool) {
	const zone4, zone6 = "\x07in-addr\x04arpa\x00", "\x03ip6\x04arpa\x00"
	switch {
	case strings.HasSuffix(name, zone4):
		return reverse4(strings.TrimSuffix(name, zone4))
	case strings.HasSuffix(name, zone6):
		return reverse6(strings.TrimSuffix(name, zone6))
	}
	return netip.Addr{}, false
}

func reverse4(labels string) (netip.Addr, bool) {
	var a [4]byte
	for i := len(a) - 1; i >= 0; i-- {
		if labels == "" || len(labels) < 1+int(labels[0]) {
			return netip.Addr{}, false
		}
		label := labels[1 : 1+int(labels[0])]
		n, err := strconv.ParseUint(label, 10, 8)
		if err != nil || len(label) > 1 && label[0] == '0' {
			return netip.Addr{}, false
		}
		a[i], labels = byte(n), labels[1+len(label):]
	}
	return netip.AddrFrom4(a), labels == ""
}

func reverse6(labels string) (netip.Addr, bool) {
	var a [16]byte
	if len(labels) != 4*len(a) { // 32 labels of one hexadecimal digit
		return netip.Addr{}, false
	}
	for i := range 2 * len(a) {
		n, err := strconv.ParseUint(labels[2*i+1:2*i+2], 16, 4)
		if labels[2*i] != 1 || err != nil {
			return netip.Addr{}, false
		}
		a[len(a)-1-i/2] |= byte(n) << (4 * (i % 2))
	}
	return netip.AddrFrom16(a), true
}
