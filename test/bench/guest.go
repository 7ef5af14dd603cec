//go:build linux

package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// readyDeadline bounds the wait for a driver to give the guest its network.
const readyDeadline = 10 * time.Second

// order is what the harness tells the load tool, as JSON in its only argument.
type order struct {
	Load    string     // name of a load, key of loads
	Target  netip.Addr // world
	Seconds float64    // length of the load
	Count   int        // loads that count: flows to open, connections at a time
	IPerf   []string   // the iperf3 command of the bulk load
	Want    string     // congestion control that the guest must use
	Port    uint16     // the server's first port
	TCPOnly bool       // the server has no UDP

	// Outside is what only the namespace around a container can tell; bridgeMain
	// fills it in.
	Outside *outside `json:",omitempty"`
}

// guestReport is the load tool's answer: the last line on its stdout.
type guestReport struct {
	Error      string             `json:",omitempty"`
	Values     map[string]float64 // metric name to value
	Errors     int                // transactions that failed
	NetNS      uint64             // inode of the network namespace
	Congestion string             // default congestion control in it
	Devices    map[string]device  // all but lo, counters of the load alone

	// The same of the namespace with the bridge, where the load runs in a container.
	OutsideDevices    map[string]device `json:",omitempty"`
	OutsideCongestion string            `json:",omitempty"`
}

// device holds how far the counters of a network device moved.
type device struct{ RxBytes, TxBytes, RxPackets, TxPackets uint64 }

// loadFunc runs one kind of load and returns its metrics and failed transactions.
type loadFunc func(order) (map[string]float64, int, error)

// loads are the kinds of work that the guest knows.
var loads = map[string]loadFunc{
	"bulk":   bulk,
	"crr":    crr,
	"crr32":  crrParallel,
	"crrrst": crrReset,
	"rr":     roundTrips,
	"udprr":  udpRoundTrips,
	"udp16":  udpWindow,
	"idle":   idleFlows,
	"active": idleAndActive,
}

// guestMain runs one order inside the guest.
func guestMain(args []string) error {
	var o order
	if len(args) != 1 {
		return errors.New("guest: one argument wanted")
	}
	if err := json.Unmarshal([]byte(args[0]), &o); err != nil {
		return fmt.Errorf("guest: order: %w", err)
	}
	report, err := obey(o)
	if err != nil {
		report.Error = err.Error()
	}
	line, err := json.Marshal(report)
	if err != nil {
		return err
	}
	fmt.Printf("%s\n", line)
	return nil
}

// obey prepares the guest, runs the load between two readings of the devices'
// counters, and reports.
func obey(o order) (guestReport, error) {
	var r guestReport
	if err := raiseFiles(); err != nil {
		return r, err
	}
	if err := waitReady(netip.AddrPortFrom(o.Target, o.Port), !o.TCPOnly && o.Target.Is4()); err != nil {
		return r, err
	}
	var err error
	if r.Congestion, err = setCongestion(o.Want); err != nil {
		return r, err
	}
	if r.NetNS, err = inode("/proc/thread-self/ns/net"); err != nil {
		return r, err
	}
	before, err := readDevices()
	if err != nil {
		return r, err
	}
	var outer map[string]device
	if o.Outside != nil {
		r.OutsideCongestion = o.Outside.Congestion
		if outer, err = devicesIn(o.Outside.DeviceFile); err != nil {
			return r, err
		}
	}
	load := loads[o.Load]
	if load == nil {
		return r, fmt.Errorf("load %q is unknown", o.Load)
	}
	values, failed, err := load(o)
	r.Values, r.Errors = values, failed
	after, derr := readDevices()
	r.Devices = moved(before, after)
	if o.Outside != nil && derr == nil {
		after, derr = devicesIn(o.Outside.DeviceFile)
		r.OutsideDevices = moved(outer, after)
	}
	return r, errors.Join(err, derr)
}

// setCongestion sets the congestion control of this network namespace, which a new
// one has from the machine's first, and returns the one in force: where choosing is
// forbidden the report shows it, and the harness refuses the sample. It is what
// connections accepted from now on use too, whenever their listener was made.
func setCongestion(want string) (string, error) {
	const file = "/proc/sys/net/ipv4/tcp_congestion_control"
	_ = os.WriteFile(file, []byte(want), 0)
	cc, err := os.ReadFile(file)
	return strings.TrimSpace(string(cc)), err
}

// waitReady waits until the server answers over TCP and, with udp, over UDP: some
// drivers configure the guest after its first process has started. It also makes
// every part of the way warm.
func waitReady(target netip.AddrPort, udp bool) error {
	deadline := time.Now().Add(readyDeadline)
	var err error
	for _, network := range []string{"tcp", "udp"}[:pick(udp, 2, 1)] {
		for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
			if err = echoOnce(network, target); err == nil {
				break
			}
			if time.Now().After(deadline) {
				return fmt.Errorf("no answer from the server within %v: %w", readyDeadline, err)
			}
			time.Sleep(wait)
		}
	}
	return nil
}

// echoOnce sends one byte and waits for it to come back.
func echoOnce(network string, target netip.AddrPort) error {
	c, err := net.DialTimeout(network, target.String(), time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Second))
	if t, ok := c.(*net.TCPConn); ok {
		t.SetLinger(0) // leave no TIME_WAIT: a row counts those
	}
	b := []byte{'x'}
	if _, err := c.Write(b); err != nil {
		return err
	}
	_, err = c.Read(b)
	return err
}

// readDevices returns the counters of the devices of this process's own network
// namespace. /proc/net/dev shows them wherever /sys was mounted.
func readDevices() (map[string]device, error) { return devicesIn("/proc/thread-self/net/dev") }

// devicesIn reads such a file.
func devicesIn(file string) (map[string]device, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	devs := make(map[string]device)
	for lines := bufio.NewScanner(f); lines.Scan(); {
		name, rest, ok := strings.Cut(strings.TrimSpace(lines.Text()), ":")
		field := strings.Fields(rest)
		if !ok || len(field) < 10 || name == "lo" {
			continue
		}
		n := make([]uint64, 10)
		for i := range n {
			n[i], _ = strconv.ParseUint(field[i], 10, 64)
		}
		devs[name] = device{RxBytes: n[0], RxPackets: n[1], TxBytes: n[8], TxPackets: n[9]}
	}
	return devs, nil
}

// moved subtracts two readings.
func moved(before, after map[string]device) map[string]device {
	out := make(map[string]device)
	for name, a := range after {
		b := before[name]
		out[name] = device{a.RxBytes - b.RxBytes, a.TxBytes - b.TxBytes, a.RxPackets - b.RxPackets, a.TxPackets - b.TxPackets}
	}
	return out
}

// inode returns the inode number of path, which names a namespace.
func inode(path string) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0, fmt.Errorf("stat %s: %w", path, err)
	}
	return st.Ino, nil
}

// selfPath returns the path of this binary.
func selfPath() (string, error) {
	p, err := os.Executable()
	if err != nil {
		return "", err
	}
	return filepath.EvalSymlinks(p)
}
