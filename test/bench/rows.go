//go:build linux

package main

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
	count   int    // order.Count
	payload int    // bytes of one transaction in one direction; 0 when the load tells
	metrics []metric
}

// Numbers of the rows: connections at a time, flows held, starts per sample.
const (
	crrAtOnce      = 32
	idleCount      = 10000
	idleCountQuick = 2000
	startsPerRound = 10
)

// rows returns all rows in the order of the table.
func rows(quick bool) []row {
	return []row{
		{name: "bulk-up", load: "bulk", metrics: []metric{{"gbps", "bulk TCP, 1 stream, guest to world", "Gbit/s", 2, true}}},
		{name: "bulk-down", load: "bulk", reverse: true, metrics: []metric{{"gbps", "bulk TCP, 1 stream, world to guest", "Gbit/s", 2, true}}},
		{name: "crr", load: "crr", payload: 1, metrics: []metric{
			{"p50", "connect, 1 byte, close; one at a time, p50", "us", 0, true},
			{"p99", "the same, p99", "us", 0, true}}},
		{name: "crr-32", load: "crr32", count: crrAtOnce, payload: 1, metrics: []metric{
			{"rate", "connect, 1 byte, close; 32 at a time", "/s", 0, true}}},
		{name: "rr", load: "rr", payload: rrBytes, metrics: []metric{
			{"p50", "TCP round trip of 64 bytes, p50", "us", 1, true}}},
		{name: "udp-rr", load: "udprr", payload: rrBytes, metrics: []metric{
			{"p50", "UDP round trip of 64 bytes, p50", "us", 1, true}}},
		{name: "udp-16", load: "udp16", payload: udpWindowBytes, metrics: []metric{
			{"rate", "UDP, 16 x 1200 bytes outstanding", "/s", 0, true}}},
		{name: "start", metrics: []metric{
			{"start", "start and end, `run -- true`", "ms", 1, false}}},
		{name: "idle", load: "idle", count: pick(quick, idleCountQuick, idleCount), payload: 1, metrics: []metric{
			{"idle_rss", "idle daemon, RSS", "MB", 1, false},
			{"idle_pss", "all its processes, PSS", "MB", 1, false},
			{"flow_kib", "memory per idle TCP flow", "KiB", 1, false},
			{"flow_fds", "descriptors per idle TCP flow", "", 2, false},
			{"flows", "idle TCP flows held", "", 0, false}}},
	}
}

// rowNames returns the names of all rows.
func rowNames() []string {
	var out []string
	for _, r := range rows(false) {
		out = append(out, r.name)
	}
	return out
}

// A goal compares slipway's median of a metric with a limit: a factor of another
// driver's median, or an absolute value when against is "". First is the first
// step, final what DESIGN asks of the netstack path in the end.
type goal struct {
	row, key     string
	driver       string // of ours
	against      string
	atLeast      bool // else at most
	first, final float64
}

// goals are the numbers to reach on the netstack path.
var goals = []goal{
	{row: "bulk-up", key: "gbps", driver: "slipway", against: "native", atLeast: true, first: 0.25},
	{row: "bulk-down", key: "gbps", driver: "slipway", against: "native", atLeast: true, first: 0.25},
	{row: "bulk-up", key: "gbps", driver: "slipway", against: "rootlesskit-gvisor", atLeast: true, first: 8, final: 10},
	{row: "bulk-down", key: "gbps", driver: "slipway", against: "rootlesskit-gvisor", atLeast: true, first: 8, final: 10},
	{row: "bulk-up", key: "gbps", driver: "slipway", against: "pasta-65520", atLeast: true, final: 1},
	{row: "bulk-down", key: "gbps", driver: "slipway", against: "pasta-65520", atLeast: true, final: 1},
	{row: "crr", key: "p50", driver: "slipway", against: "native", first: 4, final: 3.5},
	{row: "crr", key: "p99", driver: "slipway", against: "native", first: 10, final: 8},
	{row: "crr-32", key: "rate", driver: "slipway", against: "native", atLeast: true, first: 0.25, final: 0.32},
	{row: "rr", key: "p50", driver: "slipway", against: "native", first: 3.3, final: 3},
	{row: "udp-rr", key: "p50", driver: "slipway", against: "native", first: 2.6, final: 2.2},
	{row: "udp-16", key: "rate", driver: "slipway", against: "native", atLeast: true, first: 0.38, final: 0.55},
	{row: "start", key: "start", driver: "slipway", against: "rootlesskit-slirp4netns", first: 1.4, final: 1},
	{row: "start", key: "start", driver: "slipway-rootless", against: "rootlesskit-slirp4netns", first: 1.4, final: 1},
	{row: "idle", key: "idle_rss", driver: "slipway", first: 30, final: 30},
	{row: "idle", key: "flow_kib", driver: "slipway", first: 40, final: 40},
	{row: "idle", key: "flow_fds", driver: "slipway", first: 2, final: 2},
	{row: "idle", key: "flows", driver: "slipway", atLeast: true, first: idleCount, final: idleCount},
}
