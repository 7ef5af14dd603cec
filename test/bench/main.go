//go:build linux

// Command bench measures slipway beside its peers, in one run, on fresh network
// namespaces: what `make bench` calls.
//
// # Theory of operation
//
// A sample is one row of the table (a kind of work) under one driver (a way to
// give a guest a network). Every sample gets namespaces of its own, because the
// TIME_WAIT entries of the sample before are otherwise what is measured:
//
//	guest ---- driver ---- host ---- veth ---- world
//
// World runs a server (this binary, or iperf3); the guest runs a load tool (this
// binary again, so that all drivers are asked in the same way). The drivers take
// turns within a repetition and the row's number is the median of the
// repetitions, so a noisy machine is unfair to all alike. A number without proof
// is thrown away: the world must have seen the address that the driver is bound
// to use, and the bytes must show in the counters of the guest's only device and
// of world's.
//
// The run happens in mount and pid namespaces of its own (see isolate.go), so
// that nothing is left behind however it ends. The harness needs root. Whatever
// cannot be measured is a "not measured: WHY" in the table, never a missing row.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Arguments that make this binary one of its own children.
const (
	argInner = "inner" // the harness inside its own mount and pid namespaces
	argWorld = "world" // the server in the world namespace
	argGuest = "guest" // the load tool in the guest

	argBridge = "bridge" // the same in a container of the guest
	argServed = "served" // the server in the guest, whose ports are published
)

// options are the flags of one run.
type options struct {
	rows    []string
	drivers []string
	repeat  int
	quick   bool
	kernel  bool
	publish bool
	out     string
	slipway string        // path of the binary to measure; "" builds ./cmd/slipway
	seconds time.Duration // of load in one sample
}

func main() {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case argWorld:
			exit(firstError(quietly, worldMain))
		case argGuest:
			exit(firstError(quietly, func() error { return guestMain(os.Args[2:]) }))
		case argBridge:
			exit(bridgeMain(os.Args[2:]))
		case argServed:
			exit(firstError(quietly, func() error { return servedMain(os.Args[2:]) }))
		}
	}
	inner := len(os.Args) > 1 && os.Args[1] == argInner
	args := os.Args[1:]
	if inner {
		args = args[1:]
	}
	opt, err := parse(args)
	if err != nil {
		exit(err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	if inner {
		exit(runInner(ctx, opt))
	}
	exit(runOuter(ctx, opt, args))
}

// exit ends the process; an error is one line on stderr and status 1.
func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// parse reads the flags and checks the names of rows and drivers.
func parse(args []string) (options, error) {
	var opt options
	var rowList, driverList string
	fs := flag.NewFlagSet("bench", flag.ExitOnError)
	fs.StringVar(&rowList, "rows", "", "comma separated rows to measure: "+strings.Join(rowNames(), ", ")+" (default all)")
	fs.StringVar(&driverList, "drivers", "", "comma separated drivers: "+strings.Join(driverNames(), ", ")+" (default all)")
	fs.IntVar(&opt.repeat, "repeat", 0, "samples per row and driver, of which the median counts (default 5, quick 3)")
	fs.BoolVar(&opt.quick, "quick", false, "short samples, for a look while developing")
	fs.BoolVar(&opt.kernel, "kernel", false, "only the rows and drivers that the goals of the kernel path need")
	fs.BoolVar(&opt.publish, "publish", false, "only the rows of published ports")
	fs.StringVar(&opt.out, "out", "", "page to write (default docs/benchmarks.md after a full run, else none)")
	fs.StringVar(&opt.slipway, "slipway", "", "slipway binary to measure (default: built from ./cmd/slipway)")
	fs.DurationVar(&opt.seconds, "time", 0, "length of one sample (default 1.5s, with -quick or -kernel 700ms)")
	if err := fs.Parse(args); err != nil {
		return opt, err
	}
	if fs.NArg() > 0 {
		return opt, fmt.Errorf("argument %q: only flags are known", fs.Arg(0))
	}
	full := rowList == "" && driverList == "" && !opt.quick && !opt.kernel && !opt.publish
	if opt.out == "" && full {
		opt.out = "docs/benchmarks.md"
	}
	if opt.repeat <= 0 {
		opt.repeat = pick(opt.quick, 3, 5)
	}
	if opt.seconds <= 0 {
		opt.seconds = pick(opt.quick || opt.kernel, 700*time.Millisecond, 1500*time.Millisecond)
	}
	var err error
	if opt.rows, err = names("row", rowList, rowNames()); err != nil {
		return opt, err
	}
	if opt.drivers, err = names("driver", driverList, driverNames()); err != nil {
		return opt, err
	}
	if opt.publish {
		opt.rows = slices.DeleteFunc(opt.rows, func(r string) bool { return !slices.Contains(publishedNames(), r) })
		opt.drivers = slices.DeleteFunc(opt.drivers, func(d string) bool { return !slices.Contains(publishedDrivers, d) })
	}
	if !opt.kernel {
		return opt, nil
	}
	opt.rows = slices.DeleteFunc(opt.rows, func(r string) bool { return !slices.Contains(kernelRows(), r) })
	opt.drivers = slices.DeleteFunc(opt.drivers, func(d string) bool { return !slices.Contains(kernelDrivers(), d) })
	return opt, nil
}

// names splits a comma separated list of known names; a family such as "bulk"
// stands for all names that begin with it and a dash. Empty means all.
func names(what, list string, known []string) ([]string, error) {
	if list == "" {
		return known, nil
	}
	wanted := make(map[string]bool)
	for _, name := range strings.Split(list, ",") {
		found := false
		for _, k := range known {
			if k == name || (what == "row" && strings.HasPrefix(k, name+"-")) {
				wanted[k], found = true, true
			}
		}
		if !found {
			return nil, fmt.Errorf("%s %q: not one of %s", what, name, strings.Join(known, ", "))
		}
	}
	var out []string
	for _, k := range known { // keep the order of the table
		if wanted[k] {
			out = append(out, k)
		}
	}
	return out, nil
}

// pick is the conditional expression that Go lacks.
func pick[T any](cond bool, yes, no T) T {
	if cond {
		return yes
	}
	return no
}
