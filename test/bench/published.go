//go:build linux

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"time"
)

// # Published ports
//
// In these rows the guest serves and others call: the load runs in host, towards the
// loopback, or in world, towards host's address. Native is the same server in host
// itself, so that its loopback is what a published port is compared with. The proof is
// the server's: its namespace, the clients it saw, the bytes it read and what crossed the
// guest's device.

// publisher is how a driver publishes a server that it runs in its guest.
type publisher struct {
	// command returns the command that runs args in the guest, with all of
	// publishedPorts on all of host's addresses; started in host.
	command func(dir string, args []string) *exec.Cmd
	near    netip.Addr // the client that the server sees for one on host's loopback; the zero Addr is any
	far     netip.Addr // for one in world
	inHost  bool       // there is no guest
	path    path       // of slipway's, for clients on the loopback
}

// gatewayAddr is slipway's, as whom its guests see clients on the loopback.
var gatewayAddr = netip.MustParseAddr("192.168.65.1")

// loopbackAddr is where clients in host call.
var loopbackAddr = netip.MustParseAddr("127.0.0.1")

// publishedRows returns the rows of published ports.
func publishedRows() []row {
	var out []row
	for _, from := range []struct {
		name, text string
		far        bool
	}{{"pub", "on the host's loopback", false}, {"pub-far", "on another machine", true}} {
		w := row{published: true, far: from.far, drivers: publishedDrivers}
		bulk, crr := w, w
		bulk.load = "bulk"
		for _, reverse := range []bool{false, true} {
			bulk.reverse = reverse
			bulk.name = from.name + pick(reverse, "-bulk-down", "-bulk-up")
			bulk.metrics = []metric{{"gbps", "client " + from.text + ": bulk TCP, " + pick(reverse, "guest to client", "client to guest"), "Gbit/s", 2, true}}
			out = append(out, bulk)
		}
		crr.name, crr.load, crr.payload = from.name+"-crr", "crr", 1
		crr.metrics = []metric{{"p50", "client " + from.text + ": connect, 1 byte, close; p50", "us", 0, true}, {"p99", "the same, p99", "us", 0, true}}
		out = append(out, crr)
	}
	return out
}

// publishedDrivers take part in them.
var publishedDrivers = []string{"native", "slipway-kernel", "slipway-netstack", "rootlesskit-builtin"}

// publishedNames are the names of those rows.
func publishedNames() (out []string) {
	for _, w := range publishedRows() {
		out = append(out, w.name)
	}
	return out
}

// publishedGoals are the numbers to reach.
func publishedGoals() []goal {
	all := []goal{
		{row: "pub-bulk-up", key: "gbps", against: "native", atLeast: true, first: 0.60, final: 0.75},
		{row: "pub-bulk-down", key: "gbps", against: "native", atLeast: true, first: 0.60, final: 0.75},
		{row: "pub-bulk-up", key: "gbps", against: "rootlesskit-builtin", atLeast: true, first: 1, final: 1},
		{row: "pub-bulk-down", key: "gbps", against: "rootlesskit-builtin", atLeast: true, first: 1, final: 1},
		{row: "pub-far-bulk-up", key: "gbps", against: "native", atLeast: true, first: 0.25, final: 0.25},
		{row: "pub-far-bulk-down", key: "gbps", against: "native", atLeast: true, first: 0.25, final: 0.25},
		{row: "pub-crr", key: "p50", against: "native", first: 3, final: 3},
	}
	for i := range all {
		all[i].driver = "slipway-kernel"
	}
	return all
}

// publishNative runs the server in host.
func publishNative() *publisher {
	return &publisher{command: func(_ string, args []string) *exec.Cmd { return plain(args) }, near: loopbackAddr, far: worldAddr, inHost: true}
}

// publishSlipway runs it as the command of `slipway run`.
func publishSlipway(way path) *publisher {
	return &publisher{near: gatewayAddr, far: worldAddr, path: way, command: func(dir string, args []string) *exec.Cmd {
		last := worldPortBase + worldPorts - 1
		flags := []string{"run", "--path", string(way), "-p", fmt.Sprintf("%[1]d-%[2]d:%[1]d-%[2]d", worldPortBase, last), "-p", fmt.Sprintf("%[1]d:%[1]d", iperfPort), "--"}
		return as(nil, dir, exec.Command(filepath.Join(dir, "slipway"), append(flags, args...)...))
	}}
}

// publishRootlesskit runs it as the command of rootlesskit with its fastest port driver.
func publishRootlesskit() *publisher {
	return &publisher{command: func(dir string, args []string) *exec.Cmd {
		flags := []string{"--net=slirp4netns", "--mtu=1500", "--disable-host-loopback", "--copy-up=/etc", "--port-driver=builtin"}
		for _, port := range publishedPorts() {
			flags = append(flags, fmt.Sprintf("-p=0.0.0.0:%[1]d:%[1]d/tcp", port))
		}
		return as(user(), dir, exec.Command(filepath.Join(dir, "rootlesskit"), slices.Concat(flags, []string{"--"}, args)...))
	}}
}

// publishedPorts are those of the server and iperf3's.
func publishedPorts() []int {
	ports := []int{iperfPort}
	for port := worldPortBase; port < worldPortBase+worldPorts; port++ {
		ports = append(ports, port)
	}
	return ports
}

// servedReport is what the server in the guest says when it is asked.
type servedReport struct {
	worldReport
	NetNS      uint64
	Congestion string
	Devices    map[string]device
	IPerfPeer  string // of the bulk rows
}

// servedMain is the server in the guest: world's without UDP, and with an iperf3 where an
// argument asks for one. It prints "ready", then a report for each line on stdin.
func servedMain(args []string) error {
	r := servedReport{}
	var err error
	if r.NetNS, err = inode("/proc/thread-self/ns/net"); err != nil {
		return err
	}
	if r.Congestion, err = setCongestion(congestion); err != nil {
		return err
	}
	s, err := newWorldServer(false)
	if err != nil {
		return err
	}
	var iperf *iperfServer
	if slices.Contains(args, "iperf3") {
		iperf = &iperfServer{cmd: exec.Command("iperf3", "--server", "--one-off", "--json", "--port", strconv.Itoa(iperfPort))}
		iperf.cmd.Stdout = &iperf.out
		if err := iperf.cmd.Start(); err != nil {
			return err
		}
		defer iperf.stop()
	}
	before, err := readDevices()
	if err != nil {
		return err
	}
	rawReady := make(chan struct{})
	go func() {
		rawMode()
		close(rawReady)
		s.run()
	}()
	<-rawReady
	fmt.Println("ready")
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		if iperf != nil {
			r.IPerfPeer = iperf.peer()
		}
		after, err := readDevices()
		if err != nil {
			return err
		}
		r.Devices = moved(before, after)
		s.mu.Lock()
		r.worldReport = s.report
		line, _ := json.Marshal(r)
		s.mu.Unlock()
		fmt.Printf("%s\n", line)
	}
	return nil
}

// served is a running server in a guest.
type served struct {
	cmd    *exec.Cmd
	ask    io.WriteCloser
	answer *bufio.Reader
	errs   bytes.Buffer
}

// startServed starts it and waits until it says that it is ready.
func startServed(ctx context.Context, t *topology, p *publisher, more ...string) (*served, error) {
	s := &served{cmd: p.command(t.dir, append([]string{filepath.Join(t.dir, "bench"), argServed}, more...))}
	s.cmd.Stderr = &s.errs
	var err error
	if s.ask, err = s.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	s.answer = bufio.NewReader(out)
	if err := startIn(nsHost, s.cmd); err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { killGroup(s.cmd) })
	if line, err := s.answer.ReadString('\n'); line != "ready\n" {
		s.close()
		stop()
		return nil, fmt.Errorf("the server in the guest said %q: %w: %s", line, cmpErr(err, errors.New("not ready")), complaint(s.errs.Bytes()))
	}
	return s, nil
}

// report asks it.
func (s *served) report() (r servedReport, err error) {
	if _, err := fmt.Fprintln(s.ask); err != nil {
		return r, fmt.Errorf("the server in the guest: %w", err)
	}
	line, err := s.answer.ReadBytes('\n')
	if err != nil {
		return r, fmt.Errorf("the server in the guest: %w: %s", err, complaint(s.errs.Bytes()))
	}
	return r, json.Unmarshal(line, &r)
}

func (s *served) close() {
	s.ask.Close()
	endProcess(s.cmd)
}

// takePublished is take for the rows of published ports.
func (r *runner) takePublished(ctx context.Context, w row, d driver, t *topology) (map[string]float64, error) {
	p := d.publish
	var more []string
	if w.load == "bulk" {
		if err := need("iperf3"); err != nil {
			return nil, err
		}
		more = []string{"iperf3"}
	}
	server, err := startServed(ctx, t, p, more...)
	if err != nil {
		return nil, err
	}
	defer server.close()
	target := pick(w.far, hostAddr, loopbackAddr)
	o := order{Load: w.load, Target: target, Seconds: r.opt.seconds.Seconds(), Want: congestion, Port: worldPortBase, TCPOnly: true, IPerf: iperfCommand(w, r.opt, target)}
	report, _, err := r.obeyed(ctx, o, &guest{run: plain, ns: pick(w.far, nsWorld, nsHost)})
	if err != nil {
		return nil, err
	}
	time.Sleep(resetSettle) // the last FIN may still be on its way
	seen, err := server.report()
	if err != nil {
		return nil, err
	}
	hostNS, err := namespaceID(nsHost)
	if err != nil {
		return nil, err
	}
	if err := checkPublished(w, p, hostNS, report, seen); err != nil {
		return nil, fmt.Errorf("no proof that the driver carried it: %w", err)
	}
	report.Values["failed"] = float64(report.Errors)
	return report.Values, nil
}

// checkPublished returns what speaks against the driver having carried the load.
func checkPublished(w row, p *publisher, hostNS uint64, report guestReport, seen servedReport) error {
	if report.Congestion != congestion || seen.Congestion != congestion {
		return fmt.Errorf("client uses %s, guest %s instead of %s", report.Congestion, seen.Congestion, congestion)
	}
	if (seen.NetNS == hostNS) != p.inHost {
		return fmt.Errorf("the server is in namespace %d, host is %d", seen.NetNS, hostNS)
	}
	if !w.far && report.NetNS != hostNS {
		return errors.New("the load did not run in the host's namespace")
	}
	want := pick(w.far, p.far, p.near)
	if seen.IPerfPeer != "" {
		seen.Peers = append(seen.Peers, seen.IPerfPeer)
	}
	slices.Sort(seen.Peers)
	if peers := slices.Compact(seen.Peers); want.IsValid() && (len(peers) != 1 || peers[0] != want.String()) {
		return fmt.Errorf("the server saw %v instead of %v", peers, want)
	}
	payload := proof{row: w, report: report}.payload()
	if w.load == "bulk" {
		return checkDevice(p, payload, seen.Devices)
	}
	if seen.Bytes < payload {
		return fmt.Errorf("the server read %d of %d bytes", seen.Bytes, payload)
	}
	return nil
}

// checkDevice finds out the path of a bulk transfer through slipway: on the kernel path
// none of it crosses the guest's device, but the handshakes of clients in world.
func checkDevice(p *publisher, payload uint64, devs map[string]device) error {
	if p.path == "" {
		return nil
	}
	dev, ok := devs[slipwayDevice]
	if !ok {
		return fmt.Errorf("guest has no %s", slipwayDevice)
	}
	crossed := max(dev.RxBytes, dev.TxBytes)
	switch inside := p.path == pathKernel; {
	case inside && crossed > payload/2:
		return fmt.Errorf("guest's %s counted %d of %d bytes: not all took the kernel path", slipwayDevice, crossed, payload)
	case !inside && crossed < payload:
		return fmt.Errorf("guest's %s counted %d of %d bytes", slipwayDevice, crossed, payload)
	}
	return nil
}
