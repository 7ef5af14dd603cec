// Command tally reads the events of `go test -json` from its standard input and
// prints one line for each package with tests, the output of whatever failed, the
// reason of every skip, lines that begin with "NOTE: ", and in the end how many tests
// passed, failed and were skipped. It exits with 1 if a test failed, or if one was
// skipped and the environment says NETNS_TESTS=require, or if no test ran at all.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
)

// module is left out of the names of suites.
const module = "github.com/slipway-net/slipway/"

func main() {
	t := tally{out: os.Stdout, suites: make(map[string]*suite)}
	if err := t.read(os.Stdin); err != nil {
		fmt.Fprintf(os.Stderr, "tally: read test events: %v\n", err)
		os.Exit(1)
	}
	if !t.summary(os.Getenv("NETNS_TESTS") == "require") {
		os.Exit(1)
	}
}

// event is one line of `go test -json` (go doc test2json, and go help buildjson).
type event struct {
	Action     string
	Package    string
	ImportPath string // of build events
	Test       string
	Output     string
	Elapsed    float64 // seconds
}

// suite is one package's tests.
type suite struct {
	name   string
	result map[string]string   // action that ended each test
	output map[string][]string // lines of each test; "" are the package's own
}

type tally struct {
	out                     io.Writer
	suites                  map[string]*suite
	passed, failed, skipped int
}

// read takes events until the end of r. Lines that are none are printed as they
// are: the go command's own words about packages it cannot load.
func (t *tally) read(r io.Reader) error {
	lines := bufio.NewReader(r)
	for {
		line, err := lines.ReadBytes('\n')
		var e event
		switch {
		case len(line) == 0:
		case json.Unmarshal(line, &e) != nil:
			t.out.Write(line)
		default:
			t.take(e)
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (t *tally) take(e event) {
	if e.Action == "build-output" {
		io.WriteString(t.out, e.Output)
		return
	}
	s := t.suites[e.Package]
	if s == nil {
		s = &suite{name: strings.TrimPrefix(e.Package, module), result: make(map[string]string), output: make(map[string][]string)}
		t.suites[e.Package] = s
	}
	switch e.Action {
	case "output":
		if strings.HasPrefix(e.Output, "NOTE: ") {
			io.WriteString(t.out, e.Output)
		}
		s.output[e.Test] = append(s.output[e.Test], e.Output)
	case "pass", "fail", "skip":
		if e.Test != "" {
			s.result[e.Test] = e.Action
		} else if e.Package != "" {
			t.finish(s, e)
		}
	}
}

// finish prints a package's line when its last test is over.
func (t *tally) finish(s *suite, e event) {
	count := make(map[string]int)
	for _, name := range sorted(s.result) {
		action := s.result[name]
		if !s.isLeaf(name) && !(action == "fail" && s.failedAlone(name)) {
			continue
		}
		count[action]++
		if action != "pass" {
			t.printf("--- %s: %s %s\n", strings.ToUpper(action), s.name, name)
			t.quote(s.output[name])
		}
	}
	if e.Action == "fail" && count["fail"] == 0 { // the build, a panic, TestMain
		count["fail"]++
		t.printf("--- FAIL: %s\n", s.name)
		for _, name := range sorted(s.output) {
			if s.result[name] == "" {
				t.quote(s.output[name])
			}
		}
	}
	t.passed += count["pass"]
	t.failed += count["fail"]
	t.skipped += count["skip"]
	if len(s.result) > 0 || e.Action == "fail" {
		t.printf("%-24s %5d passed %3d failed %3d skipped %7.1fs\n",
			s.name, count["pass"], count["fail"], count["skip"], e.Elapsed)
	}
	s.output = nil
}

// isLeaf says whether a test has no subtests: only those are counted.
func (s *suite) isLeaf(name string) bool {
	for other := range s.result {
		if strings.HasPrefix(other, name+"/") {
			return false
		}
	}
	return true
}

// failedAlone says whether no subtest explains why name failed.
func (s *suite) failedAlone(name string) bool {
	for other, action := range s.result {
		if action == "fail" && strings.HasPrefix(other, name+"/") {
			return false
		}
	}
	return true
}

// summary prints the last line and says whether all is well.
func (t *tally) summary(skipsFail bool) bool {
	unfinished := 0
	for _, name := range sorted(t.suites) {
		if s := t.suites[name]; len(s.output) > 0 {
			unfinished++
			t.printf("--- FAIL: %s did not finish\n", s.name)
		}
	}
	t.failed += unfinished
	t.printf("%d passed, %d failed, %d skipped\n", t.passed, t.failed, t.skipped)
	if skipsFail && t.skipped > 0 {
		t.printf("a skipped test is a failure here: NETNS_TESTS=require\n")
		return false
	}
	return t.failed == 0 && t.passed > 0
}

func (t *tally) printf(format string, args ...any) { fmt.Fprintf(t.out, format, args...) }

// quote prints the lines of a test but for the headings that it has already.
func (t *tally) quote(lines []string) {
	for _, l := range lines {
		if !strings.HasPrefix(l, "=== ") {
			t.printf("    %s", l)
		}
	}
}

func sorted[V any](m map[string]V) []string {
	names := make([]string, 0, len(m))
	for name := range m {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}
