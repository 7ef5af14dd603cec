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
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	iperfPort     = 5201
	sampleTimeout = 90 * time.Second // for all of one sample; a hung driver ends here
	idleSettle    = time.Second      // between the last flow opened and the look at the daemon
)

// runner takes samples.
type runner struct {
	dir string
	opt options
}

// take runs one row under one driver in fresh namespaces and returns the values
// of its metrics, proven to be the driver's.
func (r *runner) take(ctx context.Context, w row, d driver) (map[string]float64, error) {
	ctx, cancel := context.WithTimeout(ctx, sampleTimeout)
	defer cancel()
	t, err := newTopology(ctx, r.dir, w.ipv6)
	if err != nil {
		return nil, err
	}
	defer t.close()
	if w.name == "start" {
		return r.starts(ctx, d)
	}
	if w.published {
		return r.takePublished(ctx, w, d, t)
	}
	g := &guest{bridged: d.bridged}
	defer g.leave()
	if err := d.join(ctx, t, g); err != nil {
		return nil, err
	}
	return r.measure(ctx, w, t, g)
}

// measure runs the row's load in the guest.
func (r *runner) measure(ctx context.Context, w row, t *topology, g *guest) (map[string]float64, error) {
	target := pick(w.ipv6, worldAddr6, worldAddr)
	o := order{Load: w.load, Target: target, Seconds: r.opt.seconds.Seconds(), Count: w.count, Want: congestion, Port: worldPortBase}
	var server *iperfServer
	if w.load == "bulk" {
		var err error
		if server, err = startIPerf(ctx); err != nil {
			return nil, err
		}
		defer server.stop()
		o.IPerf = iperfCommand(w, r.opt, target)
	}
	before, err := t.devices()
	if err != nil {
		return nil, err
	}
	report, usage, err := r.obeyed(ctx, o, g)
	if err != nil {
		return nil, err
	}
	after, err := t.devices()
	if err != nil {
		return nil, err
	}
	seen, err := t.report()
	if err != nil {
		return nil, err
	}
	if server != nil {
		seen.Peers = append(seen.Peers, server.peer())
	}
	hostNS, err := namespaceID(nsHost)
	if err != nil {
		return nil, err
	}
	p := proof{hostNS: hostNS, row: w, guest: g, report: report, world: moved(before, after), seen: seen}
	if err := p.check(); err != nil {
		return nil, fmt.Errorf("no proof that the driver carried it: %w", err)
	}
	report.Values["failed"] = float64(report.Errors)
	if report.Values["time_wait"], err = timeWait(nsHost); err != nil {
		return nil, err
	}
	for key, v := range usage {
		report.Values[key] = v
	}
	return report.Values, nil
}

// obeyed runs the load tool in the guest, meeting it on the way in the idle row,
// where it also returns what the driver's processes use.
func (r *runner) obeyed(ctx context.Context, o order, g *guest) (guestReport, map[string]float64, error) {
	var report guestReport
	arg, err := json.Marshal(o)
	if err != nil {
		return report, nil, err
	}
	cmd := g.run([]string{filepath.Join(r.dir, "bench"), pick(g.bridged, argBridge, argGuest), string(arg)})
	var errs bytes.Buffer
	cmd.Stderr = &errs
	in, err := cmd.StdinPipe()
	if err != nil {
		return report, nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return report, nil, err
	}
	if err := startIn(g.ns, cmd); err != nil {
		return report, nil, err
	}
	defer context.AfterFunc(ctx, func() { killGroup(cmd) })()
	pid := pick(g.pid != 0, g.pid, cmd.Process.Pid)
	last, usage, err := r.converse(bufio.NewReaderSize(out, 1<<16), in, pid)
	werr := cmd.Wait()
	if ctx.Err() != nil {
		return report, nil, fmt.Errorf("load in the guest did not end within %v", sampleTimeout)
	}
	if err == nil {
		err = json.Unmarshal(last, &report)
	}
	if err != nil {
		return report, nil, fmt.Errorf("load in the guest: %w: %s", cmpErr(werr, err), complaint(errs.Bytes()))
	}
	if report.Error != "" {
		return report, nil, fmt.Errorf("load in the guest: %s %s", report.Error, complaint(errs.Bytes()))
	}
	return report, usage, nil
}

// killGroup kills a command and what it started. Only commands of wrapping
// drivers lead a group of their own.
func killGroup(cmd *exec.Cmd) {
	if cmd.SysProcAttr != nil && cmd.SysProcAttr.Setpgid {
		_ = unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
	}
	_ = cmd.Process.Kill()
}

// converse reads the load tool's lines up to its report. At "base" and "open" it
// looks at the driver's processes.
func (r *runner) converse(out *bufio.Reader, in io.WriteCloser, pid int) (last []byte, usage map[string]float64, err error) {
	defer in.Close()
	var base resources
	for {
		line, err := out.ReadBytes('\n')
		if err == io.EOF {
			return last, usage, nil
		}
		if err != nil {
			return nil, nil, err
		}
		last = bytes.TrimSpace(line)
		word, number, _ := strings.Cut(string(last), " ")
		switch word {
		case "base":
			base = r.resources(pid)
		case "open":
			flows, err := strconv.Atoi(number)
			if err != nil {
				return nil, nil, err
			}
			time.Sleep(idleSettle)
			usage = base.perFlow(r.resources(pid), flows)
		default:
			continue
		}
		if _, err := io.WriteString(in, "on\n"); err != nil {
			return nil, nil, err
		}
	}
}

// starts runs the driver's start command several times in the host namespace.
func (r *runner) starts(ctx context.Context, d driver) (map[string]float64, error) {
	var times []float64
	for range startsPerRound {
		cmd := d.start(r.dir)
		var errs bytes.Buffer
		cmd.Stderr = &errs
		begin := time.Now()
		if err := startIn(nsHost, cmd); err != nil {
			return nil, err
		}
		stop := context.AfterFunc(ctx, func() { killGroup(cmd) })
		err := cmd.Wait()
		stop()
		if err != nil {
			return nil, fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, lastLine(errs.Bytes()))
		}
		times = append(times, float64(time.Since(begin).Microseconds())/1e3)
	}
	return map[string]float64{"start": median(times)}, nil
}

// iperfServer is one iperf3 that serves one test in world.
type iperfServer struct {
	cmd *exec.Cmd
	out bytes.Buffer
}

// startIPerf starts the server and waits until it listens.
func startIPerf(ctx context.Context) (*iperfServer, error) {
	if err := need("iperf3"); err != nil {
		return nil, err
	}
	s := &iperfServer{cmd: exec.CommandContext(ctx, "iperf3", "--server", "--one-off", "--json", "--port", strconv.Itoa(iperfPort))}
	s.cmd.Stdout = &s.out
	if err := startIn(nsWorld, s.cmd); err != nil {
		return nil, err
	}
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(2 * time.Millisecond) {
		if listening(nsWorld, iperfPort) {
			return s, nil
		}
		if time.Now().After(deadline) {
			s.stop()
			return nil, errors.New("iperf3 in world does not listen")
		}
	}
}

// stop ends the server if it has not ended by itself.
func (s *iperfServer) stop() {
	if s.cmd.ProcessState == nil {
		endProcess(s.cmd)
	}
}

// peer waits for the server's end and returns the address it saw.
func (s *iperfServer) peer() string {
	timer := time.AfterFunc(5*time.Second, func() { _ = s.cmd.Process.Kill() })
	defer timer.Stop()
	_ = s.cmd.Wait()
	var res struct {
		Start struct {
			Peer struct {
				Host string `json:"host"`
			} `json:"accepted_connection"`
		} `json:"start"`
	}
	if err := json.Unmarshal(s.out.Bytes(), &res); err != nil {
		return "unknown: " + err.Error()
	}
	return strings.TrimPrefix(res.Start.Peer.Host, "::ffff:")
}

// iperfCommand is the client's command line. iperf3 knows whole seconds only.
func iperfCommand(w row, opt options, target netip.Addr) []string {
	seconds := max(1, int(opt.seconds.Seconds()+0.5))
	args := []string{"iperf3", "--client", target.String(), "--port", strconv.Itoa(iperfPort), "--json", "--time", strconv.Itoa(seconds), "--congestion", congestion}
	if w.reverse {
		args = append(args, "--reverse")
	}
	return args
}

// listening reports whether a TCP port is open in namespace ns.
func listening(ns string, port int) bool {
	wanted := fmt.Sprintf(":%04X", port)
	found := false
	_ = inNamespace(ns, func() error {
		for _, name := range []string{"tcp", "tcp6"} {
			table, err := os.ReadFile("/proc/thread-self/net/" + name)
			if err != nil {
				continue
			}
			for _, line := range strings.Split(string(table), "\n") {
				f := strings.Fields(line)
				found = found || len(f) > 3 && strings.HasSuffix(f[1], wanted) && f[3] == "0A" // TCP_LISTEN
			}
		}
		return nil
	})
	return found
}
