package test

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// The guest's own firewall and NAT come first: what its rules do is the same on every
// path as natively. Each case has a port of its own, so that the rules of all are loaded
// together and everything is tried at the same time; a case is tried from the namespace
// and from a container behind a bridge, for IPv4 and IPv6.

// fwPatience is how long somebody waits who is dropped, and fwAnswer for an answer that has
// to come, however busy the machine is.
const fwPatience, fwAnswer = 2500 * time.Millisecond, 20 * time.Second

// What becomes of a connection: the name of who answers, an errno as text, or one of
// these.
const (
	silence = "silence"
	goesOn  = "goes on" // of a connection that was there before
	refused = "connection refused"
)

// fwCase is some rules, and what they do.
type fwCase struct {
	name  string
	rules []string // {p} is the case's port
	to    string   // whom to connect to; {world}, port {p}, if empty
	port  int
	from  int     // the container's index
	want  outcome // of new connections
	held  outcome // of connections that were there before the rules; goesOn if empty
	// heldKernel is held on the kernel path where that differs. It does for rules that
	// come later about containers: an open connection's packets end in the guest's
	// kernel, so INPUT and OUTPUT have their say, and FORWARD has none.
	heldKernel outcome
}

// outcome is from the namespace, and from a container.
type outcome struct{ namespace, container string }

func anywhere(s string) outcome { return outcome{s, s} }

// at is what becomes of somebody there.
func (o outcome) at(p place) string {
	if p.name == "container" {
		return o.container
	}
	return o.namespace
}

// patience is how long to wait where that is to be expected.
func patience(want string) time.Duration {
	if strings.Contains(want, silence) {
		return fwPatience
	}
	return fwAnswer
}

// fwCommon is needed by several cases: kube-proxy's way to masquerade what has a mark.
var fwCommon = []string{
	"nat -N KUBE-MARK-MASQ",
	"nat -A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000",
	"nat -N KUBE-POSTROUTING",
	"nat -A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN",
	"nat -A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0",
	"nat -A KUBE-POSTROUTING -j MASQUERADE --random-fully",
	"nat -I POSTROUTING 1 -j KUBE-POSTROUTING",
	"nat -N KUBE-SERVICES",
	"nat -A PREROUTING -j KUBE-SERVICES",
	"nat -A OUTPUT -j KUBE-SERVICES",
	"filter -A FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT",
}

// fwCases are the cases.
func fwCases() []fwCase {
	all := []fwCase{{name: "no rule", want: anywhere("world")}}
	all = append(all, filterCases()...)
	all = append(all, natCases()...)
	return append(all, markCases()...)
}

// filterCases drop and reject, in each chain that a user would.
func filterCases() (all []fwCase) {
	chains := []struct {
		rule      string
		container bool // else it concerns the namespace
	}{
		{"filter -I DOCKER-USER -p tcp --dport {p}", true},
		{"filter -I FORWARD -i docker0 -p tcp --dport {p}", true},
		{"filter -A OUTPUT -p tcp --dport {p}", false},
	}
	targets := []struct{ target, want, held string }{
		{"DROP", silence, silence},
		{"REJECT --reject-with {admin}", "{EADMIN}", silence},
		{"REJECT --reject-with {port}", refused, silence},
		{"REJECT --reject-with tcp-reset", refused, "connection reset by peer"},
	}
	for _, chain := range chains {
		for _, target := range targets {
			c := fwCase{
				name:  strings.Fields(chain.rule)[2] + " " + target.target,
				rules: []string{chain.rule + " -j " + target.target},
				want:  outcome{target.want, "world"}, held: outcome{target.held, goesOn},
			}
			if chain.container {
				c.want, c.held = outcome{"world", target.want}, outcome{goesOn, target.held}
				c.heldKernel = anywhere(goesOn)
			}
			all = append(all, c)
		}
	}
	return all
}

// natCases give connections another target.
func natCases() []fwCase {
	const (
		containers = "nat -A PREROUTING -i docker0 -p tcp -d {world} --dport {p} -j DNAT --to-destination "
		local      = "nat -A OUTPUT -p tcp -d {world} --dport {p} -j DNAT --to-destination "
	)
	dnat := func(name, to, want string) fwCase {
		return fwCase{name: name, rules: []string{containers + to, local + to}, want: anywhere(want)}
	}
	service := func(n int, to, want string) fwCase {
		address := fmt.Sprintf("{svc}%d", n)
		return fwCase{name: "service for " + to, to: address, port: 443, want: anywhere(want), rules: []string{
			"nat -A KUBE-SERVICES -p tcp -d " + address + " --dport 443 -j KUBE-MARK-MASQ",
			"nat -A KUBE-SERVICES -p tcp -d " + address + " --dport 443 -j DNAT --to-destination " + to,
		}}
	}
	return []fwCase{
		{name: "DNAT of containers", rules: []string{containers + "[{other}]:{p}"}, want: outcome{"world", "other"}},
		{name: "DNAT of local processes", rules: []string{local + "[{other}]:{p}"}, want: outcome{"other", "world"}},
		dnat("DNAT of both", "[{other}]:{p}", "other"),
		dnat("DNAT to a closed port", "[{other}]:1", refused),
		dnat("DNAT to a black hole", "[{hole}]:{p}", silence),
		service(1, "[{second}]:{p}", "second"),
		service(2, "[{other}]:{p}", "other"),
		service(3, "[{other}]:1", refused),
	}
}

// markCases set marks, and count where they are seen.
func markCases() []fwCase {
	seen := func(chain, match, mark, where string) string {
		return fmt.Sprintf(`mangle -A %s -p tcp %s -m mark --mark %s/%s -m comment --comment "%s, {name}"`, chain, match, mark, mark, where)
	}
	mark := func(name, set, mark string) fwCase {
		return fwCase{name: name, want: anywhere("world"), rules: []string{
			"mangle -A PREROUTING -i docker0 -p tcp --dport {p} -j MARK " + set,
			"mangle -A OUTPUT -p tcp --dport {p} -j MARK " + set,
			seen("FORWARD", "--dport {p}", mark, mark+" in FORWARD"),
			seen("POSTROUTING", "--dport {p}", mark, mark+" in POSTROUTING"),
		}}
	}
	ours := mark("our own bit", "--set-mark 0x1000", "0x1000")
	all := mark("all bits", "--set-mark 0xffffffff", "0xffffffff")
	// slipway takes its bit away (docs/paths.md), so FORWARD does not see it.
	ours.rules, all.rules = ours.rules[:2], all.rules[:2]
	return []fwCase{
		ours, all,
		mark("one bit by set-xmark", "--set-xmark 0x4000/0x4000", "0x4000"),
		mark("another by set-xmark", "--set-xmark 0x8000/0x8000", "0x8000"),
		mark("all by set-mark", "--set-mark 0x8000", "0x8000"),
		mark("all by set-xmark", "--set-xmark 0xc000/0xffffffff", "0xc000"),
		{name: "saved and restored", want: anywhere("world"), rules: []string{
			"mangle -A PREROUTING -p tcp --dport {p} -j CONNMARK --restore-mark",
			"mangle -A PREROUTING -p tcp --sport {p} -j CONNMARK --restore-mark",
			"mangle -A PREROUTING -i docker0 -p tcp --dport {p} -m mark --mark 0 -j MARK --set-mark 0x4000",
			"mangle -A OUTPUT -p tcp --dport {p} -j CONNMARK --restore-mark",
			"mangle -A OUTPUT -p tcp --dport {p} -m mark --mark 0 -j MARK --set-mark 0x4000",
			"mangle -A POSTROUTING -p tcp --dport {p} -j CONNMARK --save-mark",
			seen("POSTROUTING", "--dport {p}", "0x4000", "restored"),
		}},
		{name: "one bit saved and restored", want: anywhere("world"), rules: []string{
			"mangle -A PREROUTING -p tcp -m multiport --ports {p} -j CONNMARK --restore-mark --nfmask 0x4000 --ctmask 0x4000",
			"mangle -A PREROUTING -i docker0 -p tcp --dport {p} -j MARK --set-xmark 0x4000/0x4000",
			"mangle -A OUTPUT -p tcp --dport {p} -j MARK --set-xmark 0x4000/0x4000",
			"mangle -A POSTROUTING -p tcp --dport {p} -j CONNMARK --save-mark --nfmask 0x4000 --ctmask 0x4000",
			seen("POSTROUTING", "--dport {p}", "0x4000", "restored"),
		}},
		{name: "saved with every packet", want: anywhere("world"), rules: []string{
			"mangle -A POSTROUTING -p tcp -m multiport --ports {p} -j CONNMARK --save-mark",
		}},
		{name: "connections marked", want: anywhere("world"), rules: []string{
			"mangle -A PREROUTING -p tcp --dport {p} -j CONNMARK --set-mark 0x8000",
			"mangle -A OUTPUT -p tcp --dport {p} -j CONNMARK --set-mark 0x8000",
		}},
	}
}

// fwGlobal are rules for everything, one set after another. Each has a container of its
// own: one that the kernel path failed for avoids it for a while.
var fwGlobal = fromOwn([]fwCase{
	{name: "INPUT only established", rules: []string{
		"filter -A INPUT -i lo -j ACCEPT",
		"filter -A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
		"filter -A INPUT -p ipv6-icmp -j ACCEPT",
		"filter -P INPUT DROP",
	}, want: anywhere("world")},
	{name: "INPUT and OUTPUT drop INVALID", rules: []string{
		"filter -A INPUT -m conntrack --ctstate INVALID -j DROP",
		"filter -A OUTPUT -m conntrack --ctstate INVALID -j DROP",
		"filter -A FORWARD -m conntrack --ctstate INVALID -j DROP",
	}, want: anywhere("world")},
	{name: "INPUT nothing at all", rules: []string{"filter -A INPUT -p ipv6-icmp -j ACCEPT", "filter -P INPUT DROP"},
		want: outcome{silence, "world"}, held: outcome{silence, goesOn}, heldKernel: anywhere(silence)},
	{name: "OUTPUT drops SYN-ACKs", rules: []string{"filter -A OUTPUT -p tcp --tcp-flags SYN,ACK SYN,ACK -j DROP"}, want: anywhere("world")},
	{name: "OUTPUT drops other sources", rules: []string{"filter -A OUTPUT -p tcp ! -s {guest} -j DROP"},
		want: anywhere("world"), heldKernel: anywhere(silence)},
	{name: "OUTPUT only to servers", rules: []string{
		"filter -A OUTPUT -p tcp --dport 7900:9000 -j ACCEPT",
		"filter -A OUTPUT -p ipv6-icmp -j ACCEPT",
		"filter -P OUTPUT DROP",
	}, want: anywhere("world"), heldKernel: anywhere(silence)},
	{name: "reverse path", rules: []string{"raw -A PREROUTING -m rpfilter --invert -j DROP"}, want: anywhere("world")},
})

func fromOwn(cases []fwCase) []fwCase {
	for i := range cases {
		cases[i].from = 2 + i
	}
	return cases
}

// fwSaid is what became of everything on one guest.
type fwSaid struct {
	fresh, held, flushed, global, globalHeld map[string]string

	counted map[string]bool
	tables  string
	err     error
}

// TestFirewall compares the cases, with both flavours of iptables: on new connections,
// on connections that were there before the rules, and when everything is flushed.
func TestFirewall(t *testing.T) {
	for _, tables := range flavours {
		t.Run(string(tables), func(t *testing.T) {
			guests := allGuests(t)
			said := make([]fwSaid, len(guests))
			var wg sync.WaitGroup
			for i, g := range guests {
				r := newFWRun(t, g, tables)
				r.holdAll(t)
				wg.Go(func() { said[i] = r.run() })
			}
			wg.Wait()
			for i, g := range guests {
				t.Run(g.kind.name, func(t *testing.T) { said[i].compare(t, g, &said[0]) })
			}
		})
	}
}

// compare reports what is not as natively, and natively not as it should be.
func (s *fwSaid) compare(t *testing.T, g *guest, native *fwSaid) {
	if s.err != nil {
		t.Fatal(s.err)
	}
	differ(t, "a new connection", s.fresh, native.fresh, expect(fwCases(), fwCase.fresh))
	differ(t, "with rules for all", s.global, native.global, expect(fwGlobal, fwCase.fresh))
	if g.kind.kernel() {
		differ(t, "a connection from before", s.held, nil, expect(fwCases(), fwCase.onKernel))
		differ(t, "from before, with rules for all", s.globalHeld, nil, expect(fwGlobal, fwCase.onKernel))
	} else {
		differ(t, "a connection from before", s.held, native.held, expect(fwCases(), fwCase.before))
		differ(t, "from before, with rules for all", s.globalHeld, native.globalHeld, expect(fwGlobal, fwCase.before))
	}
	for what, n := range native.counted {
		if s.counted[what] != n {
			t.Errorf("the mark is seen (%s): %v, natively %v", what, s.counted[what], n)
		}
	}
	for what, now := range s.flushed {
		// Natively a flush of nftables takes the addresses of connections that are
		// there; with slipway they have none but their own.
		if now != goesOn && now != "world" && !(g.kind.native && strings.HasPrefix(what, "before")) {
			t.Errorf("after the flush, %s: %s", what, now)
		}
	}
	for _, own := range []string{"table ip slipway\n", "table ip6 slipway\n"} {
		if !g.kind.native && !strings.Contains(s.tables, own) {
			t.Errorf("tables after the flush: %q", s.tables)
		}
	}
}

// differ compares outcomes with what they are natively, if that is the measure, and with
// what is expected.
func differ(t *testing.T, what string, said, native, want map[string]string) {
	t.Helper()
	for _, name := range slices.Sorted(maps.Keys(want)) {
		switch {
		case native == nil && said[name] != want[name]:
			t.Errorf("%s, %s: %q, expected %q", what, name, said[name], want[name])
		case native != nil && native[name] != want[name]:
			t.Errorf("%s, %s: natively %q, expected %q", what, name, native[name], want[name])
		case native != nil && said[name] != native[name]:
			t.Errorf("%s, %s: %q, natively %q", what, name, said[name], native[name])
		}
	}
}

// What is expected of a case.
func (c fwCase) fresh() outcome { return c.want }

func (c fwCase) before() outcome {
	if c.held == (outcome{}) {
		return anywhere(goesOn)
	}
	return c.held
}

func (c fwCase) onKernel() outcome {
	if c.heldKernel == (outcome{}) {
		return c.before()
	}
	return c.heldKernel
}

// expect spells out what is expected, for each family and place. Nothing was held for
// a case that is not about world.
func expect(cases []fwCase, of func(fwCase) outcome) map[string]string {
	all := make(map[string]string)
	for _, c := range cases {
		if c.to != "" && of(c) == c.before() {
			continue
		}
		for _, f := range families {
			words := familyWords(f)
			all[fwName(c.name, "namespace", f)] = words.Replace(of(c).namespace)
			all[fwName(c.name, "container", f)] = words.Replace(of(c).container)
		}
	}
	return all
}

func fwName(name, place string, f family) string {
	return fmt.Sprintf("%s from %s, %s", name, place, f.name)
}
