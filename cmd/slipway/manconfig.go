package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// The page of slipway.toml is made of docs/configuration.md, whose table of settings a test
// compares with the settings that there are. Of Markdown it needs what that file has:
// headings, paragraphs, code, links and tables.

// writeConfigPage writes slipway.toml(5) into dir, made of the Markdown file at from.
func writeConfigPage(dir, from string) error {
	text, err := os.ReadFile(from)
	if err != nil {
		return fmt.Errorf("write manual page: %w", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "slipway.toml.5"), []byte(configPage(string(text))), 0o644); err != nil {
		return fmt.Errorf("write manual page: %w", err)
	}
	return nil
}

func configPage(markdown string) string {
	var b strings.Builder
	fmt.Fprintf(&b, ".TH SLIPWAY.TOML 5 \"\" \"slipway %s\" \"File Formats\"\n", troff(version))
	b.WriteString(".SH NAME\nslipway.toml \\- settings of slipway and its engines\n")
	lines := strings.Split(strings.TrimSpace(markdown), "\n")
	for i := 0; i < len(lines); {
		n := 1
		switch line := lines[i]; {
		case line == "":
		case strings.HasPrefix(line, "# "):
			b.WriteString(".SH DESCRIPTION\n")
		case strings.HasPrefix(line, "## "):
			b.WriteString(".SH " + troff(strings.ToUpper(line[3:])) + "\n")
		case strings.HasPrefix(line, "```"):
			n = run(lines[i+1:], func(l string) bool { return l != "```" }) + 2
			b.WriteString(".PP\n" + troffBlock(strings.Join(lines[i+1:i+n-1], "\n")))
		case strings.HasPrefix(line, "|"):
			n = run(lines[i:], func(l string) bool { return strings.HasPrefix(l, "|") })
			manTable(&b, lines[i:i+n])
		default:
			n = run(lines[i:], func(l string) bool { return l != "" && !strings.HasPrefix(l, "|") && !strings.HasPrefix(l, "```") })
			b.WriteString(".PP\n")
			for line := range strings.SplitSeq(manInline(strings.Join(lines[i:i+n], "\n")), "\n") {
				b.WriteString(atStart(line) + "\n")
			}
		}
		i += n
	}
	b.WriteString(".SH SEE ALSO\n.BR slipway (1)\n")
	return b.String()
}

// run is how many lines from the first on are of one kind.
func run(lines []string, is func(string) bool) (n int) {
	for n < len(lines) && is(lines[n]) {
		n++
	}
	return n
}

// manTable lists the rows of a table: the first cell is what the others are about, the last
// one says it, and those between go with their heads.
func manTable(b *strings.Builder, lines []string) {
	head := cells(lines[0])
	for _, line := range lines[min(2, len(lines)):] {
		row := cells(line)
		last := len(row) - 1
		b.WriteString(".TP\n" + manInline(row[0]) + "\n")
		if row[last] != "" {
			b.WriteString(atStart(manInline(row[last])) + ".\n")
		}
		var more []string
		for i := 1; i < last && i < len(head); i++ {
			more = append(more, head[i]+": "+manInline(row[i]))
		}
		if more != nil {
			if row[last] != "" {
				b.WriteString(".br\n")
			}
			b.WriteString(strings.Join(more, "; ") + "\n")
		}
	}
}

func cells(line string) []string {
	row := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), " | ")
	for i := range row {
		row[i] = strings.TrimSpace(row[i])
	}
	return row
}

var reLink = regexp.MustCompile(`\[([^\]]*)\]\([^)]*\)`)

// manInline sets code in bold, and links as their text. Lines stay lines.
func manInline(s string) string {
	parts := strings.Split(s, "`")
	for i, p := range parts {
		if i%2 == 0 {
			p = reLink.ReplaceAllString(p, "$1")
		}
		if parts[i] = escape(p); i%2 == 1 {
			parts[i] = `\fB` + parts[i] + `\fR`
		}
	}
	return strings.Join(parts, "")
}

// atStart has the first character of a line mean itself.
func atStart(line string) string {
	if strings.HasPrefix(line, ".") || strings.HasPrefix(line, "'") {
		return `\&` + line
	}
	return line
}
