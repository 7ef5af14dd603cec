package arch

import (
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write docs/cli.md anew from the commands' help")

// build builds the binary and returns its path.
func build(t *testing.T) string {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "slipway")
	cmd := exec.Command("go", "build", "-o", bin, "./cmd/slipway")
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return bin
}

// help returns what a command says of itself; an unknown command fails.
func help(t *testing.T, bin string, words ...string) (string, error) {
	t.Helper()
	out, err := exec.Command(bin, append(words, "--help")...).CombinedOutput()
	return string(out), err
}

// subcommands returns the names below "Available Commands:" (or a group of its
// own) in a help text.
func subcommands(text string) []string {
	var names []string
	in := false
	for l := range strings.Lines(text) {
		l = strings.TrimRight(l, "\n")
		if strings.HasSuffix(l, ":") && !strings.HasPrefix(l, " ") {
			in = strings.Contains(l, "Commands")
			continue
		}
		if f := strings.Fields(l); in && strings.HasPrefix(l, "  ") && len(f) > 1 {
			names = append(names, f[0])
		}
	}
	return slices.DeleteFunc(names, func(n string) bool { return n == "help" })
}

// docs/cli.md is what the commands say of themselves.
func TestCLIDocument(t *testing.T) {
	const file = "docs/cli.md"
	bin := build(t)
	var b strings.Builder
	b.WriteString(cliHead)
	var walk func(words ...string)
	walk = func(words ...string) {
		text, err := help(t, bin, words...)
		if err != nil {
			t.Fatalf("slipway %s --help: %v\n%s", strings.Join(words, " "), err, text)
		}
		b.WriteString("\n## " + strings.Join(append([]string{"slipway"}, words...), " ") + "\n\n```text\n" + strings.TrimSpace(text) + "\n```\n")
		if len(words) > 0 && words[0] == "completion" {
			return // one for each shell, all alike
		}
		for _, name := range subcommands(text) {
			walk(append(slices.Clone(words), name)...)
		}
	}
	walk()
	if *update {
		if err := os.WriteFile(filepath.Join(root, file), []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(filepath.Join(root, file))
	if err != nil || string(got) != b.String() {
		t.Errorf("%s is not what the commands say (%v): go test ./internal/arch -run TestCLIDocument -update", file, err)
	}
}

const cliHead = `# Command line

This page is what the commands say of themselves with ` + "`--help`" + `; a test keeps it so.

Exit status: the command's own (128+n if signal n ended it); 125 when slipway itself
failed before the command started; 126 when the command cannot be executed, 127 when it
is not found. Errors are one line on stderr, ` + "`slipway: WHAT on WHICH: WHY`" + `, with a
second line ` + "`hint: ...`" + ` where you can do something about it. Every listing takes ` + "`--json`" + `
and then prints one JSON document.
`

// What the documents tell the reader to type exists: targets of make, commands of
// slipway, and their flags.
func TestCommandsInDocuments(t *testing.T) {
	bin := build(t)
	makefile, err := os.ReadFile(filepath.Join(root, "Makefile"))
	if err != nil {
		t.Fatal(err)
	}
	checked := 0
	for _, d := range documents(t) {
		for i, l := range d.lines {
			if d.fence[i] != "sh" && d.fence[i] != "console" {
				continue
			}
			for _, words := range simpleCommands(l) {
				switch {
				case words[0] == "make":
					checked++
					for _, w := range words[1:] {
						if !strings.Contains(w, "=") && !strings.Contains("\n"+string(makefile), "\n"+w+":") {
							t.Errorf("%s:%d: make has no target %s", d.path, i+1, w)
						}
					}
				case filepath.Base(words[0]) == "slipway":
					checked++
					if why := checkSlipway(t, bin, words[1:]); why != "" {
						t.Errorf("%s:%d: %s: %s", d.path, i+1, strings.Join(words, " "), why)
					}
				}
			}
		}
	}
	if checked < 5 {
		t.Errorf("%d commands found in the documents: is the test still reading them?", checked)
	}
}

var (
	separators = regexp.MustCompile(`&&|\|\||[|;]`)
	assignment = regexp.MustCompile(`^[A-Za-z_]+=`)
)

// simpleCommands splits a line of shell into commands without prompt, sudo and
// assignments in front.
func simpleCommands(line string) [][]string {
	line, _, _ = strings.Cut(" "+line, " #")
	line = strings.TrimPrefix(strings.TrimSpace(line), "$ ")
	var found [][]string
	for _, part := range separators.Split(line, -1) {
		words := strings.Fields(strings.TrimSuffix(strings.TrimSpace(part), "&"))
		for len(words) > 0 && (words[0] == "sudo" || words[0] == "!" || assignment.MatchString(words[0])) {
			words = words[1:]
		}
		if len(words) > 0 {
			found = append(found, words)
		}
	}
	return found
}

// checkSlipway looks the command and its flags, up to "--", up in the help.
func checkSlipway(t *testing.T, bin string, words []string) (why string) {
	if end := slices.Index(words, "--"); end >= 0 {
		words = words[:end]
	}
	var path []string
	text, err := help(t, bin)
	for len(words) > 0 && slices.Contains(subcommands(text), words[0]) && err == nil {
		path, words = append(path, words[0]), words[1:]
		text, err = help(t, bin, path...)
	}
	if err != nil {
		return err.Error()
	}
	if len(path) == 0 && len(words) > 0 && !strings.HasPrefix(words[0], "-") && words[0] != "help" {
		return "no such command"
	}
	for _, w := range words {
		name, _, _ := strings.Cut(w, "=")
		if strings.HasPrefix(name, "-") && !regexp.MustCompile(`(^|[\s,])`+regexp.QuoteMeta(name)+`([\s,=]|$)`).MatchString(text) {
			return "no flag " + name
		}
	}
	return ""
}
