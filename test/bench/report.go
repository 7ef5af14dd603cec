//go:build linux

package main

import (
	"debug/buildinfo"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// The harness owns what is between these lines of the page; the rest is prose.
const (
	pageBegin = "<!-- bench: begin, written by `make bench` -->"
	pageEnd   = "<!-- bench: end -->"
)

// report renders the results of a run as Markdown.
type report struct {
	opt     options
	results table
	dir     string
	took    time.Duration
	notes   []string // reasons for what was not measured, in the order of the cells
}

// text returns the whole report.
func (p *report) text() string {
	r := runner{opt: p.opt}
	var b strings.Builder
	p.notes = nil
	b.WriteString(p.machine())
	ours := func(w row) bool { return w.published }
	ws, published := slices.DeleteFunc(r.rows(), ours), slices.DeleteFunc(r.rows(), func(w row) bool { return !ours(w) })
	direct, bridged := split(slices.DeleteFunc(r.chosen(), func(d driver) bool { return d.join == nil }))
	if len(direct) > 0 && len(ws) > 0 {
		b.WriteString(p.tableOf(ws, direct))
	}
	if slices.ContainsFunc(bridged, func(d driver) bool { return d.bridged }) {
		b.WriteString("\nFrom a container on a bridge in the guest, against the same native:\n")
		ws := slices.DeleteFunc(slices.Clone(ws), func(w row) bool {
			return !slices.ContainsFunc(bridged, func(d driver) bool { return d.bridged && p.takesPart(w, d) })
		})
		b.WriteString(p.tableOf(ws, bridged))
	}
	if len(published) > 0 {
		b.WriteString("\nPublished ports: the server is in the guest, the client outside. Native is the same server on the host itself:\n")
		b.WriteString(p.tableOf(published, slices.DeleteFunc(r.chosen(), func(d driver) bool { return d.publish == nil })))
	}
	p.noteAll(r.rows(), r.chosen())
	b.WriteString(p.goalsOf(r.rows()))
	for i, note := range p.notes {
		if i == 0 {
			b.WriteString("\nNot measured, or not all of it:\n\n")
		}
		fmt.Fprintf(&b, "- %s\n", note)
	}
	b.WriteString("\nDrivers:\n\n")
	for _, d := range r.chosen() {
		fmt.Fprintf(&b, "- **%s**: %s\n", d.name, d.what)
	}
	return b.String()
}

// tableOf renders medians, and ratios to native in parentheses.
func (p *report) tableOf(ws []row, ds []driver) string {
	head, rule := []string{"work"}, []string{"---"}
	for _, d := range ds {
		head, rule = append(head, d.name), append(rule, "---:")
	}
	lines := [][]string{head, rule}
	for _, w := range ws {
		if !slices.ContainsFunc(ds, func(d driver) bool { return p.takesPart(w, d) }) {
			continue
		}
		for _, m := range w.metrics {
			label := m.label
			if m.unit != "" {
				label += ", " + m.unit
			}
			line := []string{label}
			for _, d := range ds {
				line = append(line, p.cellText(w, m, d.name))
			}
			lines = append(lines, line)
		}
	}
	return "\n" + align(lines)
}

// takesPart reports whether a driver has a cell in a row.
func (p *report) takesPart(w row, d driver) bool {
	c := p.results[[2]string{w.name, d.name}]
	return c != nil && !c.out
}

// split separates the drivers whose load runs in a container, and repeats native
// beside them.
func split(ds []driver) (direct, bridged []driver) {
	for _, d := range ds {
		if d.bridged || d.name == "native" {
			bridged = append(bridged, d)
		}
		if !d.bridged {
			direct = append(direct, d)
		}
	}
	return direct, bridged
}

// noteAll keeps the reasons of all cells.
func (p *report) noteAll(ws []row, ds []driver) {
	for _, w := range ws {
		for _, d := range ds {
			p.note(w, d.name)
		}
	}
}

// cellText renders one number.
func (p *report) cellText(w row, m metric, driver string) string {
	c := p.results[[2]string{w.name, driver}]
	if c == nil || c.out {
		return "-"
	}
	v, ok := c.median(m.key)
	if !ok {
		if len(c.samples) > 0 {
			return "-" // this metric has no meaning for the driver
		}
		return "not measured"
	}
	text := fmt.Sprintf("%.*f", m.digits, v)
	if n, ok := p.results[[2]string{w.name, "native"}].median(m.key); ok && m.ratio && driver != "native" {
		text += fmt.Sprintf(" (%.2f)", v/n)
	}
	if len(c.errs) > 0 || c.failed() > 0 {
		text += " *"
	}
	return text
}

// note keeps the reasons of a cell that has no number, or an asterisk.
func (p *report) note(w row, driver string) {
	c := p.results[[2]string{w.name, driver}]
	switch {
	case c == nil || c.out:
	case len(c.samples) == 0:
		p.notes = append(p.notes, fmt.Sprintf("%s, %s: not measured: %s", w.name, driver, c.why()))
	case len(c.errs) > 0:
		p.notes = append(p.notes, fmt.Sprintf("%s, %s: %d of %d samples failed, the last with: %s", w.name, driver, len(c.errs), len(c.errs)+len(c.samples), c.why()))
	case c.failed() > 0:
		p.notes = append(p.notes, fmt.Sprintf("%s, %s: %.0f transactions failed or were lost", w.name, driver, c.failed()))
	}
}

// goalsOf renders the goals of the rows that were measured.
func (p *report) goalsOf(ws []row) string {
	lines := [][]string{{"goal", "measured", "first step", "", "final", ""}, {"---", "---:", "---:", "---", "---:", "---"}}
	for _, g := range goals() {
		for _, w := range ws {
			if w.name == g.row && p.results[[2]string{g.row, g.driver}] != nil {
				lines = append(lines, p.goalLine(g, w))
			}
		}
	}
	if len(lines) == 2 {
		return ""
	}
	return "\n" + align(lines)
}

// goalLine renders one goal.
func (p *report) goalLine(g goal, w row) []string {
	var m metric
	for _, m = range w.metrics {
		if m.key == g.key {
			break
		}
	}
	label, unit := g.driver+": "+m.label, " "+m.unit
	if g.against != "" {
		label, unit = label+", against "+g.against, " x"
	}
	if _, who := p.best(g.row, g.key); g.against == bestPeer && who != "" {
		label += ", " + who
	}
	v, why := p.measured(g)
	if why != "" {
		return []string{label, "not measured: " + why, limit(g, g.first, unit), "", limit(g, g.final, unit), ""}
	}
	return []string{label, fmt.Sprintf("%.2f%s", v, unit),
		limit(g, g.first, unit), verdict(g, v, g.first, p.opt.quick), limit(g, g.final, unit), verdict(g, v, g.final, p.opt.quick)}
}

// measured returns the value that a goal judges, or why there is none.
func (p *report) measured(g goal) (v float64, why string) {
	c := p.results[[2]string{g.row, g.driver}]
	v, ok := c.median(g.key)
	if !ok {
		return 0, cut(c.why(), 60)
	}
	if g.against == "" {
		return v, ""
	}
	if g.against == bestPeer {
		base, who := p.best(g.row, g.key)
		if who == "" {
			return 0, "no peer in this run"
		}
		return v / base, ""
	}
	other := p.results[[2]string{g.row, g.against}]
	base, ok := other.median(g.key)
	if !ok {
		return 0, g.against + ": " + cut(other.why(), 60)
	}
	return v / base, ""
}

// best returns the most that a peer reached in a row, and which it was.
func (p *report) best(row, key string) (most float64, who string) {
	for _, d := range drivers() {
		if v, ok := p.results[[2]string{row, d.name}].median(key); ok && d.peer && v > most {
			most, who = v, d.name
		}
	}
	return most, who
}

// limit renders a limit; zero is that there is none.
func limit(g goal, n float64, unit string) string {
	switch n {
	case 0:
		return ""
	case none:
		return strings.TrimSpace("0" + unit)
	}
	return strings.TrimSpace(fmt.Sprintf("%s %g%s", pick(g.atLeast, ">=", "<="), n, unit))
}

// verdict is pass or miss. A quick run holds fewer flows than the goal names, and so
// does a machine with a low limit of open files.
func verdict(g goal, v, n float64, quick bool) string {
	if n == 0 || (g.key == "flows" && (quick || (v < n && v >= float64(roomFor(fileLimit()))))) {
		return ""
	}
	if math.IsNaN(v) || (g.atLeast && v < n) || (!g.atLeast && v > n) {
		return "**miss**"
	}
	return "pass"
}

// machine says where and with what the numbers were taken.
func (p *report) machine() string {
	var uts unix.Utsname
	_ = unix.Uname(&uts)
	var b strings.Builder
	line := func(what, text string) { fmt.Fprintf(&b, "- %s: %s\n", what, text) }
	line("date", time.Now().UTC().Format("2006-01-02 15:04 UTC"))
	line("machine", fmt.Sprintf("%d x %s, %.0f GiB of memory", runtime.NumCPU(), procField("/proc/cpuinfo", "model name"), kilobytes("/proc/meminfo", "MemTotal:")/(1<<30)))
	line("system", fmt.Sprintf("Linux %s, %s", unix.ByteSliceToString(uts.Release[:]), osName()))
	line("load", fmt.Sprintf("medians of %d samples of %v each, taken in turns, %s on both ends, MTU 1500 where not said otherwise; the run took %v", p.opt.repeat, p.opt.seconds, congestion, p.took.Round(time.Second)))
	if n := roomFor(fileLimit()); n < idleCount+activeCount && !p.opt.quick {
		line("flows", fmt.Sprintf("a process may have no more than %d files open here, so the idle rows hold %d flows in all", fileLimit(), n))
	}
	line("versions", strings.Join(p.versions(), ", "))
	return b.String()
}

// versions lists what was measured.
func (p *report) versions() []string {
	out := []string{"slipway " + moduleVersion(filepath.Join(p.dir, "slipway"), "")}
	out = append(out, "rootlesskit "+rootlesskitVersion+" with gvisor-tap-vsock "+moduleVersion(filepath.Join(p.dir, "rootlesskit"), "github.com/containers/gvisor-tap-vsock"))
	for _, pkg := range []string{"slirp4netns", "passt", "iperf3"} {
		version, err := exec.Command("dpkg-query", "-W", "-f", "${Version}", pkg).Output()
		out = append(out, pkg+" "+pick(err == nil, string(version), "of unknown version"))
	}
	return append(out, runtime.Version())
}

// moduleVersion returns the version of a module in a Go binary; "" asks for the
// commit that the binary itself was built from.
func moduleVersion(binary, module string) string {
	info, err := buildinfo.ReadFile(binary)
	if err != nil {
		return "(not there)"
	}
	for _, dep := range info.Deps {
		if dep.Path == module {
			return dep.Version
		}
	}
	commit, dirty := info.Main.Version, ""
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision":
			commit = s.Value[:min(12, len(s.Value))]
		case s.Key == "vcs.modified" && s.Value == "true":
			dirty = "+changes"
		}
	}
	return commit + dirty
}

// procField returns the text after "key :" in a file of /proc.
func procField(file, key string) string {
	text, _ := os.ReadFile(file)
	for _, line := range strings.Split(string(text), "\n") {
		if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == key {
			return strings.TrimSpace(v)
		}
	}
	return "unknown " + key
}

// osName returns the distribution's name of itself.
func osName() string {
	text, _ := os.ReadFile("/etc/os-release")
	for _, line := range strings.Split(string(text), "\n") {
		if v, ok := strings.CutPrefix(line, "PRETTY_NAME="); ok {
			return strings.Trim(v, `"`)
		}
	}
	return "unknown distribution"
}

// align renders a Markdown table that can also be read as it is.
func align(lines [][]string) string {
	width := make([]int, len(lines[0]))
	for _, line := range lines {
		for i, text := range line {
			width[i] = max(width[i], len(text))
		}
	}
	var b strings.Builder
	for n, line := range lines {
		for i, text := range line {
			fill := pick(n == 1, "-", " ")
			pad := strings.Repeat(fill, width[i]-len(text))
			if strings.HasSuffix(lines[1][i], ":") {
				b.WriteString("| " + pad + text + " ")
			} else {
				b.WriteString("| " + text + pad + " ")
			}
		}
		b.WriteString("|\n")
	}
	return b.String()
}

// cut shortens s to n bytes.
func cut(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return s[:n] + "..."
}

// writeTo puts the report between the marks of the page, or makes the page.
func (p *report) writeTo(path string) error {
	old, err := os.ReadFile(path)
	if err != nil && !os.IsNotExist(err) {
		return err
	}
	return os.WriteFile(path, []byte(splice(string(old), p.text())), 0o644)
}

// splice replaces what is between the marks in page; a page without marks gets
// them at its end.
func splice(page, text string) string {
	block := pageBegin + "\n\n" + text + "\n" + pageEnd
	before, rest, ok := strings.Cut(page, pageBegin)
	if !ok {
		return strings.TrimSpace(pick(page == "", "# Benchmarks", page)) + "\n\n" + block + "\n"
	}
	_, after, _ := strings.Cut(rest, pageEnd)
	return before + block + after
}
