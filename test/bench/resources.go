//go:build linux

package main

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// resources is what the processes of a driver use.
type resources struct {
	largestRSS float64 // bytes, of the process that has most
	pss        float64 // bytes, of all
	fds        int     // open descriptors of all
}

// perFlow compares two readings that n flows lie between.
func (base resources) perFlow(with resources, n int) map[string]float64 {
	const mb, kib = 1e6, 1024
	if base.largestRSS == 0 { // there is no daemon: the kernel does it all
		return nil
	}
	return map[string]float64{
		"idle_rss": base.largestRSS / mb,
		"idle_pss": base.pss / mb,
		"flow_kib": max(0, with.pss-base.pss) / float64(n) / kib,
		"flow_fds": float64(with.fds-base.fds) / float64(n),
	}
}

// resources reads what process pid and its descendants use, our own load tools
// and what they started left out.
func (r *runner) resources(pid int) resources {
	children := make(map[int][]int)
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, name := range stats {
		stat, err := os.ReadFile(name)
		if err != nil {
			continue // it has ended
		}
		// The command name, in parentheses, may hold anything.
		after := string(stat[strings.LastIndexByte(string(stat), ')')+1:])
		if f := strings.Fields(after); len(f) > 1 {
			parent, _ := strconv.Atoi(f[1])
			child, _ := strconv.Atoi(filepath.Base(filepath.Dir(name)))
			children[parent] = append(children[parent], child)
		}
	}
	var sum resources
	own := filepath.Join(r.dir, "bench")
	var walk func(int)
	walk = func(pid int) {
		dir := filepath.Join("/proc", strconv.Itoa(pid))
		if exe, _ := os.Readlink(filepath.Join(dir, "exe")); exe == own {
			return
		}
		sum.largestRSS = max(sum.largestRSS, kilobytes(filepath.Join(dir, "status"), "VmRSS:"))
		sum.pss += kilobytes(filepath.Join(dir, "smaps_rollup"), "Pss:")
		fds, _ := os.ReadDir(filepath.Join(dir, "fd"))
		sum.fds += len(fds)
		for _, child := range children[pid] {
			walk(child)
		}
	}
	walk(pid)
	return sum
}

// kilobytes returns the value, in bytes, of a "Key:  N kB" line; 0 without one.
func kilobytes(file, key string) float64 {
	text, err := os.ReadFile(file)
	if err != nil {
		return 0
	}
	for _, line := range strings.Split(string(text), "\n") {
		if f := strings.Fields(line); len(f) >= 2 && f[0] == key {
			n, _ := strconv.ParseFloat(f[1], 64)
			return n * 1024
		}
	}
	return 0
}
