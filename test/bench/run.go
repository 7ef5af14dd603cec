//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"
)

// giveUp is after how many failures, without one success, a cell of the table is
// left alone.
const giveUp = 2

// cell is what is known of one row under one driver.
type cell struct {
	samples []map[string]float64
	errs    []error
	absent  error // why nothing was tried
	out     bool  // the driver takes no part in this row
}

// table holds all cells by row and driver.
type table map[[2]string]*cell

// runInner is the harness inside its own namespaces.
func runInner(ctx context.Context, opt options) error {
	dir := os.Getenv("SLIPBENCH_DIR")
	if dir == "" || os.Getpid() != 1 {
		return errors.New("inner: only the harness itself calls this")
	}
	if err := settleIn(dir); err != nil {
		return err
	}
	begin := time.Now()
	r := &runner{dir: dir, opt: opt}
	results := r.all(ctx)
	if ctx.Err() != nil {
		return errors.New("interrupted")
	}
	page := report{opt: opt, results: results, dir: dir, took: time.Since(begin)}
	fmt.Print(page.text())
	if opt.out == "" {
		return nil
	}
	if err := page.writeTo(opt.out); err != nil {
		return err
	}
	fmt.Fprintln(os.Stderr, "bench: wrote", opt.out)
	return nil
}

// all takes all samples. The drivers take turns, and each repetition begins with
// another one.
func (r *runner) all(ctx context.Context) table {
	results := make(table)
	ds := r.chosen()
	for _, w := range r.rows() {
		for _, d := range ds {
			results[[2]string{w.name, d.name}] = r.newCell(w, d)
		}
	}
	for rep := range r.opt.repeat {
		for _, w := range r.rows() {
			for i := range ds {
				d := ds[(i+rep)%len(ds)]
				c := results[[2]string{w.name, d.name}]
				if ctx.Err() != nil || (w.most > 0 && rep >= w.most) || c.out || c.absent != nil || (len(c.samples) == 0 && len(c.errs) >= giveUp) {
					continue
				}
				r.once(ctx, rep, w, d, c)
			}
		}
	}
	return results
}

// once takes one sample into c and says so on stderr.
func (r *runner) once(ctx context.Context, rep int, w row, d driver, c *cell) {
	values, err := r.take(ctx, w, d)
	if err != nil {
		c.errs = append(c.errs, err)
		fmt.Fprintf(os.Stderr, "%d/%d %-10s %-24s %v\n", rep+1, r.opt.repeat, w.name, d.name, err)
		return
	}
	c.samples = append(c.samples, values)
	var shown []string
	for _, m := range w.metrics {
		if v, ok := values[m.key]; ok {
			shown = append(shown, fmt.Sprintf("%s %.*f %s", m.key, m.digits, v, m.unit))
		}
	}
	if values["failed"] > 0 {
		shown = append(shown, fmt.Sprintf("FAILED transactions: %.0f", values["failed"]))
	}
	fmt.Fprintf(os.Stderr, "%d/%d %-10s %-24s %s\n", rep+1, r.opt.repeat, w.name, d.name, strings.Join(shown, ", "))
}

// newCell decides whether a driver takes part in a row.
func (r *runner) newCell(w row, d driver) *cell {
	c := new(cell)
	switch {
	case w.drivers != nil && !slices.Contains(w.drivers, d.name):
		c.out = true
	case r.opt.kernel && d.peer:
		c.out = !slices.ContainsFunc(kernelGoals(""), func(g goal) bool { return g.row == w.name && g.against == bestPeer })
	case d.rows != nil:
		c.out = !slices.Contains(d.rows, w.name)
	case w.name == "start" && d.start == nil:
		c.out = true
	}
	if !c.out && d.check != nil {
		c.absent = d.check(r.dir)
	}
	return c
}

// chosen returns the drivers of this run.
func (r *runner) chosen() []driver {
	return slices.DeleteFunc(drivers(), func(d driver) bool { return !slices.Contains(r.opt.drivers, d.name) })
}

// rows returns the rows of this run.
func (r *runner) rows() []row {
	return slices.DeleteFunc(rows(r.opt.quick), func(w row) bool { return !slices.Contains(r.opt.rows, w.name) })
}

// median returns the median of a metric over the samples that have it.
func (c *cell) median(key string) (float64, bool) {
	var v []float64
	if c != nil {
		for _, s := range c.samples {
			if x, ok := s[key]; ok {
				v = append(v, x)
			}
		}
	}
	return median(v), len(v) > 0
}

// failed returns how many transactions failed in all samples.
func (c *cell) failed() (n float64) {
	for _, s := range c.samples {
		n += s["failed"]
	}
	return n
}

// why returns the reason for an empty cell.
func (c *cell) why() string {
	switch {
	case c == nil:
		return "left out of this run"
	case c.absent != nil:
		return c.absent.Error()
	case len(c.errs) > 0:
		return c.errs[len(c.errs)-1].Error()
	}
	return ""
}
