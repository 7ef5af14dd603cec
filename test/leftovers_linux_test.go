package test

import (
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/slipway-net/slipway/test/topo"
)

// leftovers is a picture of everything an engine could leave behind: processes,
// the namespaces they are in, mounts, files of /run, links and rules of host.
// The tests have a pid and a mount namespace of their own, so all of it is
// either the tests' or slipway's.
type leftovers map[string]bool

// snapshot takes the picture, when nobody comes or goes: what an earlier test has just ended
// would be missing later.
func snapshot(t testing.TB, net *topo.Topology) (l leftovers) {
	t.Helper()
	eventually(5*time.Second, func() bool {
		l = picture(t, net)
		now := make(leftovers)
		now.processes()
		return len(l.missingFrom(now)) == 0 && !slices.ContainsFunc(now.missingFrom(l), isProcess)
	})
	return l
}

func isProcess(name string) bool { return strings.HasPrefix(name, "process ") }

func picture(t testing.TB, net *topo.Topology) leftovers {
	t.Helper()
	l := make(leftovers)
	l.processes()
	l.mounts()
	l.files("/run")
	for _, args := range [][]string{{"ip", "-o", "link"}, {"ip", "rule"}, {"ip", "-6", "rule"}, {"ip", "route", "show", "table", "all"}} {
		out, err := net.Host.Run("", args...)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(out) {
			if strings.Contains(line, "table local") || strings.HasPrefix(line, "fe80:") || strings.Contains(line, "multicast") {
				continue // the kernel's own, which come a moment after the address
			}
			l["host: "+strings.TrimSpace(line)] = true
		}
	}
	l["host rules: "+ruleset(t, net.Host)] = true
	return l
}

// ruleset returns `nft list ruleset` of a namespace, byte for byte.
func ruleset(t testing.TB, ns *topo.NS) string {
	t.Helper()
	out, err := ns.Run("", "nft", "list", "ruleset")
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func (l leftovers) processes() {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, d := range dirs {
		cmdline, err := os.ReadFile(d + "/cmdline")
		if err != nil || d == fmt.Sprintf("/proc/%d", os.Getpid()) {
			continue
		}
		if len(cmdline) == 0 {
			// A zombie, which is its parent's to bury: ours are in good hands.
			if of := parentOfZombie(d); of != 0 && of != os.Getpid() {
				l[fmt.Sprintf("process %s: a zombie of process %d", d, of)] = true
			}
			continue
		}
		l[fmt.Sprintf("process %s: %s", d, strings.ReplaceAll(string(cmdline), "\x00", " "))] = true
		for _, kind := range []string{"net", "mnt", "user", "pid"} {
			if ns, err := os.Readlink(d + "/ns/" + kind); err == nil {
				l["namespace "+ns] = true
			}
		}
	}
}

// parentOfZombie returns the parent of the process with the folder dir, or 0 if that has not
// ended, as a kernel's thread.
func parentOfZombie(dir string) (parent int) {
	text, _ := os.ReadFile(dir + "/stat") // proc_pid_stat(5): PID (NAME) STATE PARENT ...
	if _, rest, ok := strings.Cut(string(text), ") Z "); ok {
		fmt.Sscan(rest, &parent)
	}
	return parent
}

func (l leftovers) mounts() {
	text, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(text)) {
		l["mount "+strings.TrimSpace(line)] = true
	}
}

func (l leftovers) files(root string) {
	filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		// The folder that holds all engines may stay. On a slow machine dockerd asks containerd
		// for its stacks, and no test knows whose are there.
		stacks, _ := filepath.Match(runTmp+"/containerd.*.stacks.log", path)
		if err == nil && !stacks && !(d.IsDir() && filepath.Base(path) == "slipway") {
			l["file "+path] = true
		}
		return nil
	})
}

// compare fails the test if anything is there that the picture does not show. A
// process that was just told to end is given some time.
func (l leftovers) compare(t testing.TB, net *topo.Topology) {
	t.Helper()
	var more, less []string
	same := eventually(15*time.Second, func() bool {
		now := picture(t, net)
		more, less = l.missingFrom(now), now.missingFrom(l)
		return len(more)+len(less) == 0
	})
	if !same {
		t.Errorf("left behind:\n\t%s\ngone:\n\t%s", strings.Join(more, "\n\t"), strings.Join(less, "\n\t"))
	}
}

// missingFrom returns what other has and l has not.
func (l leftovers) missingFrom(other leftovers) []string {
	var names []string
	for name := range maps.Keys(other) {
		if !l[name] {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// eventually polls ok until it is true or the time is over.
func eventually(within time.Duration, ok func() bool) bool {
	deadline := time.Now().Add(within)
	for {
		if ok() {
			return true
		}
		if time.Now().After(deadline) {
			return false
		}
		time.Sleep(20 * time.Millisecond)
	}
}
