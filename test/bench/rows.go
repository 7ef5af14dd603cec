//go:build linux

package main

import (
	"fmt"
	"math"
	"slices"
)

// metric is one number of a row.
type metric struct {
	key    string // in the values of a sample
	label  string
	unit   string
	digits int // after the point
	ratio  bool
}

// row is one kind of work.
type row struct {
	name    string
	load    string // key of loads; "" for the start row
	reverse bool   // bulk towards the guest
	udp     bool
	ipv6    bool
	count   int      // order.Count
	payload int      // bytes of one transaction in one direction; 0 when the load tells
	most    int      // samples that are enough; 0 for as many as asked for
	drivers []string // that take part; nil is all
	// published has the guest serve on published ports: see published.go. The load runs
	// in host, or for far in world.
	published, far bool
	metrics        []metric
}

// Numbers of the rows: connections at a time, flows held, starts per sample.
const (
	crrAtOnce      = 32
	idleCount      = 10000
	idleCountQuick = 2000
	startsPerRound = 10
)

// flowFiles is how many descriptors a driver may need for a flow, otherFiles how many
// for everything else.
const (
	flowFiles  = 2
	otherFiles = 1000
)

// roomFor returns how many flows fit into a limit of open files.
func roomFor(files uint64) int {
	return int(min(max(files, otherFiles+2*flowFiles*activeCount)-otherFiles, 1<<30)) / flowFiles
}

// enoughIdle samples of the long rows whose numbers do not depend on luck.
const enoughIdle = 3

// idleDrivers leaves out drivers whose idle row would only repeat another's.
var idleDrivers = []string{"native", "slipway", "slipway-kernel", "slipway-kernel-bridge", "slipway-netstack", "slirp4netns", "pasta", "rootlesskit-gvisor"}

// rows returns all rows in the order of the table.
func rows(quick bool) []row {
	idle := min(pick(quick, idleCountQuick, idleCount), roomFor(fileLimit()))
	all := []row{
		{name: "bulk-up", load: "bulk", metrics: []metric{{"gbps", "bulk TCP, 1 stream, guest to world", "Gbit/s", 2, true}}},
		{name: "bulk-down", load: "bulk", reverse: true, metrics: []metric{{"gbps", "bulk TCP, 1 stream, world to guest", "Gbit/s", 2, true}}},
		{name: "crr", load: "crr", payload: 1, metrics: []metric{
			{"p50", "connect, 1 byte, close; one at a time, p50", "us", 0, true},
			{"p99", "the same, p99", "us", 0, true}}},
		{name: "crr-32", load: "crr32", count: crrAtOnce, payload: 1, metrics: []metric{
			{"rate", "connect, 1 byte, close; 32 at a time", "/s", 0, true}}},
		{name: "crr-rst", load: "crrrst", payload: 1, metrics: []metric{
			{"p50", "connect, 1 byte, reset; one at a time, p50", "us", 0, true},
			{"time_wait", "TIME_WAIT on the host after it", "", 0, false}}},
		{name: "rr", load: "rr", payload: rrBytes, metrics: []metric{
			{"p50", "TCP round trip of 64 bytes, p50", "us", 1, true}}},
		{name: "udp-rr", load: "udprr", udp: true, payload: rrBytes, metrics: []metric{
			{"p50", "UDP round trip of 64 bytes, p50", "us", 1, true}}},
		{name: "udp-16", load: "udp16", udp: true, payload: udpWindowBytes, metrics: []metric{
			{"rate", "UDP, 16 x 1200 bytes outstanding", "/s", 0, true}}},
	}
	all = append(all, rows6(all)...)
	all = append(all, publishedRows()...)
	return append(all,
		row{name: "start", metrics: []metric{
			{"start", "start and end, `run -- true`", "ms", 1, false}}},
		row{name: "idle", load: "idle", count: idle, payload: 1, most: enoughIdle, drivers: idleDrivers, metrics: []metric{
			{"idle_rss", "idle daemon, RSS", "MB", 1, false},
			{"idle_pss", "all its processes, PSS", "MB", 1, false},
			{"flow_kib", "memory per idle TCP flow", "KiB", 1, false},
			{"flow_fds", "descriptors per idle TCP flow", "", 2, false},
			{"flows", "idle TCP flows held", "", 0, false}}},
		row{name: "idle+active", load: "active", count: min(idle, roomFor(fileLimit())-activeCount), payload: 1, most: enoughIdle,
			drivers: []string{"native", "slipway-kernel", "slipway-kernel-bridge", "slipway-netstack"}, metrics: []metric{
				{"rate", fmt.Sprintf("round trips of %d flows beside idle ones", activeCount), "/s", 0, true},
				{"failed", "of all these flows, broken or silent", "", 0, false}}})
}

// rows6 returns rows of ipv4 again, over IPv6. Not every peer has it.
func rows6(ipv4 []row) (out []row) {
	for _, w := range ipv4 {
		name := map[string]string{"bulk-up": "bulk6-up", "bulk-down": "bulk6-down", "crr": "crr6", "rr": "rr6"}[w.name]
		if name == "" {
			continue
		}
		w.name, w.ipv6 = name, true
		w.drivers = []string{"native", "native-bridge", "slipway-kernel", "slipway-kernel-bridge", "slipway-netstack"}
		if w.load == "bulk" { // Debian's pasta of 2023 loses a small message sooner or later, and hangs
			w.drivers = append(w.drivers, "pasta")
		}
		w.metrics = slices.Clone(w.metrics)
		for i := range w.metrics {
			w.metrics[i].label = "IPv6: " + w.metrics[i].label
		}
		out = append(out, w)
	}
	return out
}

// rowNames returns the names of all rows.
func rowNames() []string {
	var out []string
	for _, r := range rows(false) {
		out = append(out, r.name)
	}
	return out
}

// kernelRows returns the rows of a run with -kernel.
func kernelRows() (out []string) {
	for _, w := range rows(false) {
		if w.ipv6 || slices.ContainsFunc(kernelGoals(""), func(g goal) bool { return g.row == w.name }) {
			out = append(out, w.name)
		}
	}
	return out
}

// kernelDrivers returns the drivers of a run with -kernel. The peers are there for the
// rows that compare with them.
func kernelDrivers() []string {
	out := []string{"native", "native-bridge", "slipway-kernel", "slipway-kernel-bridge"}
	for _, d := range drivers() {
		if d.peer && d.join != nil && !slices.Equal(d.rows, []string{"start"}) {
			out = append(out, d.name)
		}
	}
	return out
}

// A goal compares slipway's median of a metric with a limit: a factor of another
// driver's median, or an absolute value when against is "". First is the first
// step, final what DESIGN asks in the end; 0 is no limit, and none is 0.
type goal struct {
	row, key     string
	driver       string // of ours
	against      string
	atLeast      bool // else at most
	first, final float64
}

const (
	none     = math.SmallestNonzeroFloat64 // as a limit: not even one
	bestPeer = "the best peer"             // as goal.against: whichever peer of this run has most
)

// goals returns the numbers to reach.
func goals() []goal {
	all := append(kernelGoals("slipway-kernel"), kernelGoals("slipway-kernel-bridge")...)
	all = append(all, netstackGoals("slipway-netstack")...)
	all = append(all, publishedGoals()...)
	return append(all, []goal{
		{row: "start", key: "start", driver: "slipway", against: "rootlesskit-slirp4netns", first: 1.4, final: 1},
		{row: "start", key: "start", driver: "slipway-rootless", against: "rootlesskit-slirp4netns", first: 1.4, final: 1},
	}...)
}

// kernelGoals are those of the kernel path, the same from a container as without.
func kernelGoals(driver string) []goal {
	all := []goal{
		{row: "bulk-up", key: "gbps", against: "native", atLeast: true, first: 0.60, final: 0.75},
		{row: "bulk-down", key: "gbps", against: "native", atLeast: true, first: 0.60, final: 0.75},
		{row: "bulk-up", key: "gbps", against: bestPeer, atLeast: true, first: 2},
		{row: "bulk-down", key: "gbps", against: bestPeer, atLeast: true, first: 2},
		{row: "crr", key: "p50", against: "native", first: 2.5, final: 2.2},
		{row: "crr", key: "p99", against: "native", first: 8, final: 8},
		{row: "crr-32", key: "rate", against: "native", atLeast: true, first: 0.38, final: 0.42},
		{row: "crr-rst", key: "time_wait", first: none, final: none},
		{row: "rr", key: "p50", against: "native", first: 2.1, final: 2},
		{row: "udp-rr", key: "p50", against: "native", first: 2.3, final: 2.2},
		{row: "udp-16", key: "rate", against: "native", atLeast: true, first: 0.50, final: 0.55},
		{row: "idle", key: "idle_rss", first: 30, final: 30},
		{row: "idle", key: "flow_kib", first: 8, final: 8},
		{row: "idle", key: "flow_fds", first: 2, final: 2},
		{row: "idle", key: "flows", atLeast: true, first: idleCount, final: idleCount},
		{row: "idle+active", key: "failed", first: none, final: none},
	}
	for i := range all {
		all[i].driver = driver
	}
	return all
}

// netstackGoals are those of the netstack path.
func netstackGoals(driver string) []goal {
	all := []goal{
		{row: "bulk-up", key: "gbps", against: "native", atLeast: true, first: 0.25},
		{row: "bulk-down", key: "gbps", against: "native", atLeast: true, first: 0.25},
		{row: "bulk-up", key: "gbps", against: "rootlesskit-gvisor", atLeast: true, first: 8, final: 10},
		{row: "bulk-down", key: "gbps", against: "rootlesskit-gvisor", atLeast: true, first: 8, final: 10},
		{row: "bulk-up", key: "gbps", against: "pasta-65520", atLeast: true, final: 1},
		{row: "bulk-down", key: "gbps", against: "pasta-65520", atLeast: true, final: 1},
		{row: "crr", key: "p50", against: "native", first: 4, final: 3.5},
		{row: "crr", key: "p99", against: "native", first: 10, final: 8},
		{row: "crr-32", key: "rate", against: "native", atLeast: true, first: 0.25, final: 0.32},
		{row: "rr", key: "p50", against: "native", first: 3.3, final: 3},
		{row: "udp-rr", key: "p50", against: "native", first: 2.6, final: 2.2},
		{row: "udp-16", key: "rate", against: "native", atLeast: true, first: 0.38, final: 0.55},
		{row: "idle", key: "idle_rss", first: 30, final: 30},
		{row: "idle", key: "flow_kib", first: 40, final: 40},
		{row: "idle", key: "flow_fds", first: 2, final: 2},
		{row: "idle", key: "flows", atLeast: true, first: idleCount, final: idleCount},
		{row: "idle+active", key: "failed", first: none, final: none},
	}
	for i := range all {
		all[i].driver = driver
	}
	return all
}
