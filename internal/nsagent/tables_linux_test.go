package nsagent

import (
	"bufio"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"
)

func init() {
	guestTests = append(guestTests,
		guestTest{"tables_survive_flush", testTablesSurviveFlush},
		guestTest{"tables_go_with_daemon", testTablesGoWithDaemon},
		guestTest{"tables_foreign", testTablesForeign},
		guestTest{"tables_foreign_goes", testTablesForeignGoes},
		guestTest{"tables_of_another_slipway", testTablesOfAnotherSlipway},
		guestTest{"tables_missing_expression", testTablesMissingExpression},
		guestTest{"tables_repaired", testTablesRepaired},
		guestTest{"tables_not_owned_joined", testTablesNotOwnedJoined},
	)
}

const ourTables = "nft list table ip slipway; nft list table ip6 slipway"

func testTablesSurviveFlush(t *testing.T) {
	g := startKernel(t, testSpec(t))
	before := g.sh(t, ourTables)
	g.sh(t, "nft flush ruleset")
	if after := g.sh(t, ourTables); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	for _, cmd := range []string{"nft delete table ip slipway", "nft flush chain ip6 slipway output",
		"nft add rule ip slipway raw drop", "nft add table ip slipway '{ flags dormant; }'"} {
		if out := g.sh(t, cmd+" 2>&1 && echo done; true"); !strings.Contains(out, "not permitted") {
			t.Errorf("%s: %s", cmd, out)
		}
	}
	kernelWorks(t, g)
}

// The agent keeps nothing that would outlive the daemon: not the tables, nor the
// listeners, nor the device. What needs somebody to take it back goes with them.
func testTablesGoWithDaemon(t *testing.T) {
	f := newForeign(t, ordinaryUser())
	before := f.sh(t, foreignState+foreignKernelState)
	spec := joinSpec(t, Join{PID: f.pid})
	spec.StopTimeout = time.Hour
	c := daemonCommand(t, spec, `trap "" TERM; sleep 1000 & wait; sleep 1000`)
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	sc := bufio.NewScanner(out)
	_, command := awaitReady(t, sc)
	awaitTrap(t, command, "SigIgn")
	if state := f.sh(t, "nft list ruleset; ss -Hltn; ip rule"); !strings.Contains(state, "tproxy") ||
		!strings.Contains(state, "192.168.65.1:") || !strings.Contains(state, "7965") {
		t.Fatalf("there is only\n%s", state)
	}
	c.Process.Kill()
	c.Wait()
	// The command has an hour, and nothing waits for it.
	eventually(t, "the daemon's things are gone", func() bool {
		return f.sh(t, "nft list ruleset; ss -Hltn; ip -o link show type tun; ip rule | grep 7965; ip -6 rule | grep 7965; true") == ""
	})
	if !alive(command) {
		t.Error("the command has ended")
	}
	if out := f.sh(t, "bash -c 'exec 3<>/dev/tcp/198.51.100.7/80' 2>&1; true"); !strings.Contains(out, "unreachable") {
		t.Errorf("connect without a daemon: %s", out)
	}
	unix.Kill(command, unix.SIGKILL)
	eventually(t, "everything is as before", func() bool { return f.sh(t, foreignState+foreignKernelState) == before })
}

// A table of our name that somebody else has stays as it is, and we say so.
func testTablesForeign(t *testing.T) {
	f := newForeign(t, ordinaryUser())
	f.sh(t, "nft add table ip slipway; nft add chain ip slipway raw")
	before := f.sh(t, foreignState+foreignKernelState)
	began := time.Now()
	g := start(t, joinSpec(t, Join{PID: f.pid}))
	if d := time.Since(began); d < foreignTableLimit {
		t.Errorf("waited only %v", d)
	}
	const want = "table ip slipway exists already"
	if r := g.Report(); r.SNAT != want || r.Kernel != want || r.Kernel6 != "" || g.Kernel() != nil {
		t.Errorf("%+v", r)
	}
	state := f.sh(t, "nft list table ip slipway; ip rule; ip -6 rule; nft list ruleset")
	for _, not := range []string{"hook prerouting", "7965", "tproxy"} {
		if strings.Contains(state, not) {
			t.Errorf("%s in\n%s", not, state)
		}
	}
	end(t, g.Agent)
	if after := f.sh(t, foreignState+foreignKernelState); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	// In one family only.
	f.sh(t, "nft delete table ip slipway; nft add table ip6 slipway")
	g = start(t, joinSpec(t, Join{PID: f.pid}))
	const want6 = "table ip6 slipway exists already"
	if r := g.Report(); r.SNAT != want6 || r.Kernel != "" || r.Kernel6 != want6 || g.Kernel() == nil || g.Kernel().Listener6 != nil {
		t.Errorf("%+v", r)
	}
}

// The kernel may need a moment for the table of a daemon that was killed.
func testTablesForeignGoes(t *testing.T) {
	for try := 1; ; try++ { // on a busy machine it may need longer than we wait
		f := newForeign(t, ordinaryUser())
		f.sh(t, "nft add table ip slipway; nft add table ip6 slipway; { sleep 0.2; nft flush ruleset; } >/dev/null 2>&1 &")
		g := start(t, joinSpec(t, Join{PID: f.pid}))
		r := g.Report()
		if r.Kernel+r.Kernel6+r.SNAT == "" {
			return
		}
		if try == 5 {
			missing(t, "the kernel path: %s, %s, %s", r.Kernel, r.Kernel6, r.SNAT)
		}
	}
}

// One that another slipway owns, which serves the namespace by another device.
func testTablesOfAnotherSlipway(t *testing.T) {
	f := newForeign(t, ordinaryUser())
	spec := joinSpec(t, Join{PID: f.pid})
	spec.Default4, spec.Default6 = false, false
	first := startKernel(t, spec)
	before := f.sh(t, ourTables)
	spec.TUN.Name = "other0"
	second := start(t, spec)
	const want = "table ip slipway exists already"
	if r := second.Report(); r.SNAT != want || r.Kernel != want {
		t.Errorf("%+v", r)
	}
	if after := f.sh(t, ourTables); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	end(t, second.Agent)
	end(t, first.Agent)
}

// inNamespace runs f on a thread in a new network namespace. It does nothing as an
// ordinary user: a process with threads gets one only as root.
func inNamespace(t *testing.T, f func(*testing.T)) {
	t.Helper()
	if ordinaryUser() || !wholeHost(t) {
		return
	}
	onThread(func() {
		before, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			t.Fatal(err)
		}
		defer before.Close()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Fatal(err)
		}
		// Back again, even if it fails: a thread that is the process's first never
		// ends, and stands for the process.
		defer func() {
			if err := unix.Setns(fdOf(t, before), unix.CLONE_NEWNET); err != nil {
				panic(err)
			}
		}()
		f(t)
	})
}

// What a kernel lacks is named, and what does without it is there.
func testTablesMissingExpression(t *testing.T) { inNamespace(t, missingExpression) }

// missingExpression loads tables that ask for too much. There is no iptables match of
// that name, and no chain of that type.
func missingExpression(t *testing.T) {
	nft, err := openNFT()
	if err != nil {
		t.Error(err)
		return
	}
	defer nft.close()
	for _, c := range []struct{ chain, want, left string }{
		{"rule", "load nftables for IPv4: match: no such file or directory", "identity"},
		{"type", "load nftables for IPv4: nonsense chain bad: no such file or directory", "identity"},
	} {
		g := &guest{tables: &tables{nft: nft, owned: true}}
		bad := nftChain{"bad", nftables.ChainTypeFilter, nftables.ChainHookInput, 0, [][]expr.Any{
			{accept()}, join(isTCP(), &expr.Match{Name: "nosuchmatch", Info: new(xt.Unknown)}),
		}, ""}
		if c.chain == "type" {
			bad.typ = "nonsense"
		}
		var snat, kernel string
		g.loadTable(nftIPv4, []tablePart{
			{chains: []nftChain{nftIPv4.identityChain("tun0")}, why: &snat},
			{chains: []nftChain{bad}, why: &kernel},
		})
		if snat != "" || kernel != c.want {
			t.Errorf("reasons %q, %q; want %q", snat, kernel, c.want)
		}
		if has, err := nft.hasTable(nftables.TableFamilyIPv4, nftTable); err != nil || !has || len(g.tables.loaded) != 1 {
			t.Errorf("there is a table: %v, error %v, loaded %d", has, err, len(g.tables.loaded))
		}
		m, err := delTable(nftables.TableFamilyIPv4, nftTable)
		if err = errors.Join(err, nft.send([]nftMessage{m})); err != nil {
			t.Error(err)
		}
		// As on a kernel without labels.
		kernel = ""
		g.loadTable(nftIPv4, []tablePart{{
			chains:  []nftChain{bad},
			instead: nftIPv4.kernelChains("tun0", netip.MustParseAddrPort("192.0.2.1:1"), markTags()),
			why:     &kernel,
		}})
		if has, err := nft.hasTable(nftables.TableFamilyIPv4, nftTable); kernel != "" || err != nil || !has {
			t.Errorf("second choice: %q, there is a table: %v, error %v", kernel, has, err)
		}
		if err = nft.send([]nftMessage{m}); err != nil {
			t.Error(err)
		}
	}
}

// notOwned is a guest as on kernels before 5.12.
func notOwned(spec Spec) Spec {
	spec.noOwner = true
	return spec
}

func testTablesRepaired(t *testing.T) {
	g := startKernel(t, notOwned(testSpec(t)))
	before := g.sh(t, ourTables)
	if strings.Contains(before, "owner") {
		t.Fatalf("owned:\n%s", before)
	}
	kernelWorks(t, g)
	g.sh(t, "nft add table ip other; nft add chain ip other slipway; nft delete table ip other")
	quickest := time.Hour // on a busy machine one may take longer, but not all
	for i, damage := range []string{"nft flush ruleset", "nft delete table ip6 slipway", "nft flush chain ip slipway prerouting"} {
		began := time.Now()
		g.sh(t, damage)
		eventually(t, damage+" is repaired", func() bool { return g.sh(t, ourTables+" 2>&1; true") == before })
		quickest = min(quickest, time.Since(began))
		eventually(t, "it is counted", func() bool { return g.Repairs() == uint64(i+1) })
	}
	if quickest > time.Second {
		t.Errorf("repaired after %v at best", quickest)
	}
	if n := strings.Count(g.log.String(), "put the rules back"); n != 1 {
		t.Errorf("%d lines:\n%s", n, g.log)
	}
}

func testTablesNotOwnedJoined(t *testing.T) {
	f := newForeign(t, ordinaryUser())
	before := f.sh(t, foreignState+foreignKernelState)
	spec := notOwned(joinSpec(t, Join{PID: f.pid}))
	g := startKernel(t, spec)
	kernelWorks(t, g)
	end(t, g.Agent)
	if after := f.sh(t, foreignState+foreignKernelState); after != before {
		t.Errorf("before:\n%s\nafter Close:\n%s", before, after)
	}
	// What a killed one leaves the next one takes.
	g = startKernel(t, spec)
	unix.Kill(g.PID(), unix.SIGKILL)
	<-g.Done()
	end(t, g.Agent)
	f.sh(t, ourTables)
	end(t, startKernel(t, spec).Agent)
	if after := f.sh(t, "nft list ruleset"); after != "" {
		t.Errorf("left: %s", after)
	}
	// But not what somebody has added to.
	f.sh(t, "nft add table ip slipway; nft add chain ip slipway raw; nft add rule ip slipway raw accept")
	a, err := Start(t.Context(), spec, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer end(t, a)
	if r := a.Report(); r.Kernel != "table ip slipway exists already" {
		t.Errorf("%+v", r)
	}
}
