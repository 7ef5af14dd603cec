//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestMain lets the test binary be the harness and its children, as the real one.
func TestMain(m *testing.M) {
	if os.Getenv("SLIPBENCH_TEST") != "" {
		main()
	}
	if os.Getenv("SLIPBENCH_SILENCE") != "" {
		exit(firstError(quietly, hearSilence))
	}
	os.Exit(m.Run())
}

// TestHarness runs every load for a moment under the drivers that need nothing but
// the kernel, and checks that each cell was filled and proven.
func TestHarness(t *testing.T) {
	if os.Geteuid() != 0 {
		missing(t, errors.New("the harness needs root"))
	}
	for _, program := range []string{"ip", "nft"} {
		if _, err := exec.LookPath(program); err != nil {
			missing(t, err)
		}
	}
	var out, text []byte
	for range 3 { // a datagram has 200 ms, and a busy machine stalls now and then
		page := filepath.Join(t.TempDir(), "page.md")
		cmd := exec.Command(os.Args[0], "-quick", "-repeat", "1", "-time", "100ms", "-drivers", "native,native-bridge,routed",
			"-rows", "crr,crr6,rr,udp,start,idle,idle+active,pub-crr,pub-far-crr", "-out", page)
		cmd.Env = append(os.Environ(), "SLIPBENCH_TEST=1")
		var err error
		if out, err = cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if text, err = os.ReadFile(page); err != nil {
			t.Fatal(err)
		}
		// The three tables with their heads; there are no goals without slipway.
		const lines = (2 + 18) + (2 + 10) + (2 + 4)
		if !strings.Contains(string(text), "not measured") && strings.Count(string(text), "\n| ") >= lines {
			return
		}
	}
	t.Errorf("incomplete page:\n%s\n%s", text, out)
}

// hearSilence sends datagrams to a socket that never answers.
func hearSilence() error {
	silent, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := unix.Bind(silent, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		return err
	}
	name, err := unix.Getsockname(silent)
	if err != nil {
		return err
	}
	o := order{Target: netip.MustParseAddr("127.0.0.1"), Port: uint16(name.(*unix.SockaddrInet4).Port), Seconds: 2}
	if _, lost, err := udpWindow(o); err == nil || lost < 2*udpWindowSize {
		return fmt.Errorf("udpWindow: %d datagrams lost, error %v", lost, err)
	}
	return nil
}

// TestLossIsNoticed proves that the receive time-out works in raw mode: Go's
// preemption signals used to interrupt each call before its time was up.
func TestLossIsNoticed(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, os.Args[0])
	cmd.Env = append(os.Environ(), "SLIPBENCH_SILENCE=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

// missing skips loudly, or fails where nothing may be skipped.
func missing(t *testing.T, err error) {
	t.Helper()
	if os.Getenv("NETNS_TESTS") == "require" {
		t.Fatalf("network namespaces: %v", err)
	}
	t.Skipf("network namespaces: %v", err)
}

// proven is a sample that nothing speaks against.
func proven() proof {
	return proof{
		hostNS: 1,
		row:    row{payload: 64},
		guest:  &guest{source: hostAddr, viaHost: true},
		report: guestReport{NetNS: 2, Congestion: congestion, Values: map[string]float64{"n": 10}, Devices: map[string]device{"tun": {TxBytes: 1000}}},
		world:  map[string]device{"host0": {RxBytes: 1000}},
		seen:   worldReport{Peers: []string{hostAddr.String(), hostAddr.String()}, Bytes: 640},
	}
}

// onPath is a proven sample of ten connections on a path of slipway's.
func onPath(p *proof, way path, packets uint64) {
	p.guest.path = way
	p.report.Values["conns"] = 10
	p.report.Devices = map[string]device{slipwayDevice: {TxBytes: 1000, TxPackets: packets, RxPackets: packets}}
}

// inContainer turns a sample into a bridged one.
func inContainer(p *proof) {
	p.guest.bridged = true
	p.report.OutsideCongestion = congestion
	p.report.OutsideDevices = map[string]device{"docker0": {RxBytes: 1000}, "veth0": {RxBytes: 1000}}
	for name, dev := range p.report.Devices {
		p.report.OutsideDevices[name] = dev
	}
	p.report.Devices = map[string]device{"eth0": {TxBytes: 1000}}
}

func TestProofRejects(t *testing.T) {
	tests := []struct {
		name   string
		change func(*proof)
		want   string // part of the error; "" for none
	}{
		{"nothing", func(*proof) {}, ""},
		{"host_namespace", func(p *proof) { p.report.NetNS = 1 }, "host's network namespace"},
		{"guest_address", func(p *proof) { p.seen.Peers = []string{guestAddr.String()} }, "world saw"},
		{"two_addresses", func(p *proof) { p.seen.Peers = append(p.seen.Peers, guestAddr.String()) }, "world saw"},
		{"nobody_seen", func(p *proof) { p.seen.Peers = nil }, "world saw"},
		{"other_congestion_control", func(p *proof) { p.report.Congestion = "bbr" }, "bbr"},
		{"no_device", func(p *proof) { p.report.Devices = nil }, "0 devices"},
		{"second_device", func(p *proof) { p.report.Devices["eth0"] = device{} }, "2 devices"},
		{"quiet_device", func(p *proof) { p.report.Devices["tun"] = device{TxBytes: 639} }, "639 of 640"},
		{"quiet_world", func(p *proof) { p.world["host0"] = device{} }, "0 of 640"},
		{"silent_world", func(p *proof) { p.seen.Bytes = 639 }, "world read 639"},
		{"kernel", func(p *proof) { onPath(p, pathKernel, 10) }, ""},
		{"kernel_fell_back", func(p *proof) { onPath(p, pathKernel, 60) }, "not all took the kernel path"},
		{"kernel_went_elsewhere", func(p *proof) { onPath(p, pathKernel, 5) }, "not all are slipway's"},
		{"kernel_by_other_device", func(p *proof) { p.guest.path = pathKernel }, "tun instead of slipway0"},
		{"netstack", func(p *proof) { onPath(p, pathNetstack, 60) }, ""},
		{"netstack_took_kernel_path", func(p *proof) {
			onPath(p, pathNetstack, 10)
			p.report.Devices[slipwayDevice] = device{TxBytes: 600}
		}, "slipway0 counted 600 of 640"},
		{"udp_beside_kernel", func(p *proof) { onPath(p, pathKernel, 60); p.row.udp = true }, ""},
		{"container", func(p *proof) { onPath(p, pathKernel, 10); inContainer(p) }, ""},
		{"container_fell_back", func(p *proof) { onPath(p, pathKernel, 60); inContainer(p) }, "not all took the kernel path"},
		{"container_without_cubic_around", func(p *proof) { inContainer(p); p.report.OutsideCongestion = "bbr" }, "bbr around"},
		{"container_past_the_bridge", func(p *proof) { inContainer(p); p.report.OutsideDevices["docker0"] = device{} }, "docker0 counted 0"},
		{"container_without_bridge", func(p *proof) { inContainer(p); delete(p.report.OutsideDevices, "docker0") }, "no bridge"},
		{"other_way_round_world", func(p *proof) { p.guest.viaHost = false }, "guest0 counted 0"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := proven()
			tt.change(&p)
			err := p.check()
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("check() = %v, want %q", err, tt.want)
			}
		})
	}
}

func TestPublishedProofRejects(t *testing.T) {
	kernel, native := publishSlipway(pathKernel), publishNative()
	const hostNS, bytes = 1, 1000
	good := func() (row, guestReport, servedReport) {
		return row{load: "bulk"}, guestReport{NetNS: hostNS, Congestion: congestion, Values: map[string]float64{"bytes": bytes}},
			servedReport{NetNS: 2, Congestion: congestion, IPerfPeer: gatewayAddr.String(), Devices: map[string]device{slipwayDevice: {RxBytes: 90}}}
	}
	tests := []struct {
		name   string
		p      *publisher
		change func(*row, *guestReport, *servedReport)
		want   string // part of the error; "" for none
	}{
		{"nothing", kernel, func(*row, *guestReport, *servedReport) {}, ""},
		{"other_congestion_control", kernel, func(_ *row, g *guestReport, _ *servedReport) { g.Congestion = "bbr" }, "bbr"},
		{"server_in_host", kernel, func(_ *row, _ *guestReport, s *servedReport) { s.NetNS = hostNS }, "namespace"},
		{"native_not_in_host", native, func(*row, *guestReport, *servedReport) {}, "namespace"},
		{"load_elsewhere", kernel, func(_ *row, g *guestReport, _ *servedReport) { g.NetNS = 3 }, "host's namespace"},
		{"other_source", kernel, func(_ *row, _ *guestReport, s *servedReport) { s.Peers = []string{"127.0.0.1"} }, "saw"},
		{"nobody_seen", kernel, func(_ *row, _ *guestReport, s *servedReport) { s.IPerfPeer = "" }, "saw"},
		{"kernel_fell_back", kernel, func(_ *row, _ *guestReport, s *servedReport) {
			s.Devices[slipwayDevice] = device{RxBytes: bytes}
		}, "kernel path"},
		{"far_by_kernel", kernel, func(w *row, g *guestReport, s *servedReport) {
			w.far, g.NetNS, s.IPerfPeer = true, 3, worldAddr.String()
		}, ""},
		{"far_fell_back", kernel, func(w *row, g *guestReport, s *servedReport) {
			w.far, g.NetNS, s.IPerfPeer = true, 3, worldAddr.String()
			s.Devices[slipwayDevice] = device{TxBytes: bytes}
		}, "kernel path"},
		{"far_by_netstack", publishSlipway(pathNetstack), func(w *row, g *guestReport, s *servedReport) {
			w.far, g.NetNS, s.IPerfPeer = true, 3, worldAddr.String()
		}, "90 of 1000"},
		{"no_device", kernel, func(_ *row, _ *guestReport, s *servedReport) { s.Devices = nil }, "no slipway0"},
		{"silent_server", kernel, func(w *row, _ *guestReport, s *servedReport) { w.load = "crr" }, "0 of 1000"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w, g, s := good()
			tt.change(&w, &g, &s)
			err := checkPublished(w, tt.p, hostNS, g, s)
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("checkPublished() = %v, want %q", err, tt.want)
			}
		})
	}
}

func TestMedianAndQuantile(t *testing.T) {
	for _, tt := range []struct {
		v    []float64
		want float64
	}{{[]float64{3, 1, 2}, 2}, {[]float64{4, 1, 2, 3}, 2.5}, {[]float64{7}, 7}} {
		if got := median(tt.v); got != tt.want {
			t.Errorf("median(%v) = %v, want %v", tt.v, got, tt.want)
		}
	}
	if !math.IsNaN(median(nil)) {
		t.Error("median of nothing is a number")
	}
	hundred := make([]int64, 100)
	for i := range hundred {
		hundred[i] = int64(i + 1)
	}
	if q := quantile(hundred, 0.99); q != 99 {
		t.Errorf("p99 of 1..100 = %d, want 99", q)
	}
}

func TestNames(t *testing.T) {
	got, err := names("row", "udp,bulk-up", rowNames())
	if want := []string{"bulk-up", "udp-rr", "udp-16"}; err != nil || !slices.Equal(got, want) {
		t.Errorf("names = %v, %v, want %v in the order of the table", got, err, want)
	}
	if _, err := names("driver", "passta", driverNames()); err == nil {
		t.Error("an unknown driver was accepted")
	}
	if got, _ := names("driver", "pasta", driverNames()); len(got) != 1 {
		t.Errorf("driver pasta stands for %v, want itself only", got)
	}
}

func TestTimeWaitIn(t *testing.T) {
	n, err := timeWaitIn("sockets: used 3\nTCP: inuse 1 orphan 0 tw 27 alloc 2 mem 0\nUDP: inuse 0 mem 0\n")
	if n != 27 || err != nil {
		t.Errorf("timeWaitIn = %v, %v, want 27", n, err)
	}
	if _, err := timeWaitIn("sockets: used 3\n"); err == nil {
		t.Error("a file without the count gives one")
	}
}

// TestKernelRun keeps -kernel from leaving out what a goal needs.
func TestKernelRun(t *testing.T) {
	opt, err := parse([]string{"-kernel"})
	if err != nil || opt.out != "" {
		t.Fatalf("parse(-kernel) = %+v, %v, want one that writes no page", opt, err)
	}
	for _, g := range append(kernelGoals("slipway-kernel"), kernelGoals("slipway-kernel-bridge")...) {
		if !slices.Contains(opt.rows, g.row) || !slices.Contains(opt.drivers, g.driver) {
			t.Errorf("goal %s of %s is not measured", g.row, g.driver)
		}
	}
}

// TestPublishedRun does the same for -publish.
func TestPublishedRun(t *testing.T) {
	opt, err := parse([]string{"-publish"})
	if err != nil || opt.out != "" {
		t.Fatalf("parse(-publish) = %+v, %v, want one that writes no page", opt, err)
	}
	for _, g := range publishedGoals() {
		if !slices.Contains(opt.rows, g.row) || !slices.Contains(opt.drivers, g.driver) || !slices.Contains(opt.drivers, g.against) {
			t.Errorf("goal %s of %s against %s is not measured", g.row, g.driver, g.against)
		}
	}
}

// TestGoalsNameWhatExists keeps the goals from silently never being judged.
func TestGoalsNameWhatExists(t *testing.T) {
	for _, g := range goals() {
		i := slices.IndexFunc(rows(false), func(w row) bool { return w.name == g.row })
		if i < 0 || !slices.ContainsFunc(rows(false)[i].metrics, func(m metric) bool { return m.key == g.key }) {
			t.Errorf("goal %s/%s: no such row or metric", g.row, g.key)
		}
		for _, d := range []string{g.driver, g.against} {
			if d != "" && d != bestPeer && !slices.Contains(driverNames(), d) {
				t.Errorf("goal %s/%s: no driver %s", g.row, g.key, d)
			}
		}
	}
}

func TestVerdict(t *testing.T) {
	most, least := goal{}, goal{atLeast: true}
	for _, tt := range []struct {
		g    goal
		v, n float64
		want string
	}{{most, 2, 3, "pass"}, {most, 3, 3, "pass"}, {most, 4, 3, "**miss**"}, {least, 4, 3, "pass"}, {least, 2, 3, "**miss**"}, {least, math.NaN(), 3, "**miss**"}, {least, 1, 0, ""}} {
		if got := verdict(tt.g, tt.v, tt.n, false); got != tt.want {
			t.Errorf("verdict(%+v, %v, %v) = %q, want %q", tt.g, tt.v, tt.n, got, tt.want)
		}
	}
}

func TestSpliceKeepsProse(t *testing.T) {
	page := splice("# Benchmarks\n\nprose\n", "one")
	page = splice(page+"after\n", "two")
	want := "# Benchmarks\n\nprose\n\n" + pageBegin + "\n\ntwo\n" + pageEnd + "\nafter\n"
	if page != want {
		t.Errorf("page = %q, want %q", page, want)
	}
}

// TestSockaddr checks the byte order that the raw calls rely on.
func TestSockaddr(t *testing.T) {
	sa := sockaddrOf(netip.MustParseAddrPort("127.0.0.1:20001"))
	fd, err := rawSocket(&sa, unix.SOCK_DGRAM)
	if err != nil {
		t.Fatal(err)
	}
	defer rawClose(fd)
	if err := rawConnect(fd, &sa); err != nil {
		t.Fatal(err)
	}
	peer, err := unix.Getpeername(fd)
	if err != nil {
		t.Fatal(err)
	}
	if p := peer.(*unix.SockaddrInet4); p.Port != 20001 || p.Addr != [4]byte{127, 0, 0, 1} {
		t.Errorf("connected to %+v, want 127.0.0.1:20001", p)
	}
}
