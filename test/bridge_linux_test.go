package test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/slipway-net/slipway/test/topo"
)

// A container network as an engine makes it, without an engine: a bridge in the
// guest's namespace, containers behind it, and the rules that dockerd would load.

// place is where a guest's traffic comes from: the namespace itself, or a container.
type place struct {
	name string
	ns   *topo.NS
}

// bridge is a guest with containers.
type bridge struct {
	*topo.Bridge
	guest      *guest
	containers []*topo.NS
	tables     iptables
}

// newBridge gives g two containers and Docker's rules, loaded with one of the
// flavours of iptables.
func newBridge(t testing.TB, g *guest, tables iptables) *bridge {
	t.Helper()
	need(t, tables.commands()...)
	b, err := topo.NewBridge(g.ns)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Close)
	br := &bridge{Bridge: b, guest: g, tables: tables}
	br.more(t, 2)
	if g.kind.native {
		// So that a container still has a way back when somebody flushes its MASQUERADE,
		// as it has with slipway.
		if err := g.net.Host.IP(fmt.Sprintf("route add 172.17.0.0/16 via %v\nroute add fd00:172:17::/64 via %v\n", topo.Guest4, topo.Guest6)); err != nil {
			t.Fatal(err)
		}
	}
	if err := tables.load(g.ns, dockerRules...); err != nil {
		t.Fatal(err)
	}
	return br
}

// more adds containers.
func (b *bridge) more(t testing.TB, n int) {
	t.Helper()
	for range n {
		c, err := b.Container()
		if err != nil {
			t.Fatal(err)
		}
		b.containers = append(b.containers, c)
	}
}

// places are the namespace and the first container.
func (b *bridge) places() []place {
	return []place{{"namespace", b.guest.ns}, {"container", b.containers[0]}}
}

// dockerRules are what dockerd loads for its default bridge.
var dockerRules = []string{
	"filter -P FORWARD DROP",
	"filter -N DOCKER-USER",
	"filter -N DOCKER",
	"filter -A FORWARD -j DOCKER-USER",
	"filter -A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
	"filter -A FORWARD -o docker0 -j DOCKER",
	"filter -A FORWARD -i docker0 ! -o docker0 -j ACCEPT",
	"filter -A FORWARD -i docker0 -o docker0 -j ACCEPT",
	"nat -N DOCKER",
	"nat -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER",
	"nat -A POSTROUTING -s {bridge} ! -o docker0 -j MASQUERADE",
}

// iptables is one flavour of iptables(8), "nft" or "legacy".
type iptables string

// flavours are both.
var flavours = []iptables{"nft", "legacy"}

func (f iptables) commands() []string {
	return []string{"ip", "nft", "iptables-" + string(f), "ip6tables-" + string(f)}
}

// load carries out commands, each preceded by its table, for IPv4 and IPv6. Words in
// braces are replaced by what they mean in the family.
func (f iptables) load(ns *topo.NS, rules ...string) error {
	for _, fam := range families {
		script := f.script(fam, rules)
		if _, err := ns.Run(script, f.command(fam)+"-restore", "--noflush", "-w"); err != nil {
			return fmt.Errorf("%w\n%s", err, script)
		}
	}
	return nil
}

func (f iptables) command(fam family) string {
	if fam.v6 {
		return "ip6tables-" + string(f)
	}
	return "iptables-" + string(f)
}

// script is the rules as iptables-restore(8) reads them.
func (f iptables) script(fam family, rules []string) string {
	tables := make(map[string][]string)
	for _, r := range rules {
		table, rule, _ := strings.Cut(familyWords(fam).Replace(r), " ")
		tables[table] = append(tables[table], rule)
	}
	var b strings.Builder
	for _, table := range []string{"raw", "mangle", "nat", "filter"} {
		if len(tables[table]) > 0 {
			fmt.Fprintf(&b, "*%s\n%s\nCOMMIT\n", table, strings.Join(tables[table], "\n"))
		}
	}
	return b.String()
}

// flush removes all rules and chains of every table, as many a script begins.
func (f iptables) flush(ns *topo.NS) error {
	for _, fam := range families {
		for _, table := range []string{"raw", "mangle", "nat", "filter"} {
			// Without --noflush a table is replaced by what is given.
			script := "*" + table + "\nCOMMIT\n"
			if table == "filter" {
				script = "*filter\n:INPUT ACCEPT\n:FORWARD ACCEPT\n:OUTPUT ACCEPT\nCOMMIT\n"
			}
			if _, err := ns.Run(script, f.command(fam)+"-restore", "-w"); err != nil {
				return err
			}
		}
	}
	return nil
}

// counted tells for the comment of each rule of mangle whether it matched a packet.
func (f iptables) counted(ns *topo.NS) (map[string]bool, error) {
	all := make(map[string]bool)
	for _, fam := range families {
		out, err := ns.Run("", f.command(fam)+"-save", "-c", "-t", "mangle")
		if err != nil {
			return nil, err
		}
		for line := range strings.Lines(out) {
			if _, comment, ok := strings.Cut(line, `--comment "`); ok {
				comment, _, _ = strings.Cut(comment, `"`)
				all[comment+", "+fam.name] = !strings.HasPrefix(line, "[0:")
			}
		}
	}
	return all, nil
}

// familyWords says what the words in braces mean.
func familyWords(f family) *strings.Replacer {
	first4, first6 := topo.ContainerAddr(1)
	second4, second6 := topo.ContainerAddr(2)
	if f.v6 {
		return strings.NewReplacer("{bridge}", "fd00:172:17::/64", "{admin}", "icmp6-adm-prohibited", "{port}", "icmp6-port-unreachable",
			"{EADMIN}", "permission denied",
			"{world}", topo.World6.String(), "{other}", topo.Other6.String(),
			"{hole}", topo.BlackHole6.String(), "{guest}", topo.Guest6.String(),
			"{first}", first6.String(), "{second}", second6.String(), "{svc}", "fd00:10:43::")
	}
	return strings.NewReplacer("{bridge}", "172.17.0.0/16", "{admin}", "icmp-admin-prohibited", "{port}", "icmp-port-unreachable",
		"{EADMIN}", "no route to host",
		"[{other}]", topo.Other4.String(), "[{second}]", second4.String(), "[{hole}]", topo.BlackHole4.String(),
		"{world}", topo.World4.String(), "{other}", topo.Other4.String(),
		"{hole}", topo.BlackHole4.String(), "{guest}", topo.Guest4.String(),
		"{first}", first4.String(), "{second}", second4.String(), "{svc}", "10.43.0.")
}
