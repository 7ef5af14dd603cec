package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/slipway-net/slipway/internal/config"
)

// Every command has a page, and every flag is in it.
func TestManual(t *testing.T) {
	var code int
	root := newRoot(&code)
	root.InitDefaultCompletionCmd()
	dir := t.TempDir()
	if err := writeManual(dir, root); err != nil {
		t.Fatal(err)
	}
	pages := 0
	var walk func(*cobra.Command)
	walk = func(cmd *cobra.Command) {
		if cmd.Hidden || cmd.Name() == "help" {
			return
		}
		pages++
		b, err := os.ReadFile(filepath.Join(dir, manName(cmd)+".1"))
		if err != nil {
			t.Error(err)
			return
		}
		checkPage(t, cmd, string(b))
		for _, sub := range cmd.Commands() {
			walk(sub)
		}
	}
	walk(root)
	files, err := filepath.Glob(dir + "/*")
	if err != nil || len(files) != pages || pages < 15 {
		t.Errorf("%d files of %d commands, %v", len(files), pages, err)
	}
	formatPages(t, files)
}

func checkPage(t *testing.T, cmd *cobra.Command, page string) {
	t.Helper()
	for _, want := range []string{".TH ", ".SH NAME\n" + troff(manName(cmd)) + ` \- `, ".SH SYNOPSIS\n", ".SH DESCRIPTION\n", ".SH OPTIONS\n"} {
		if !strings.Contains(page, want) {
			t.Errorf("%s: no %q", cmd.CommandPath(), want)
		}
	}
	cmd.LocalFlags().VisitAll(func(f *pflag.Flag) {
		if !f.Hidden && !strings.Contains(page, `\fB\-\-`+troff(f.Name)+`\fR`) {
			t.Errorf("%s: no flag %s", cmd.CommandPath(), f.Name)
		}
	})
	for _, sub := range cmd.Commands() {
		if !sub.Hidden && sub.Name() != "help" && !strings.Contains(page, ".BR "+troff(manName(sub))+" (1)") {
			t.Errorf("%s: no command %s", cmd.CommandPath(), sub.Name())
		}
	}
}

// formatPages has groff read the pages, where there is one.
func formatPages(t *testing.T, files []string) {
	t.Helper()
	groff, err := exec.LookPath("groff")
	if err != nil {
		t.Log("not formatted: there is no groff here")
		return
	}
	out, err := exec.Command(groff, append([]string{"-man", "-Tutf8", "-ww", "-z"}, files...)...).CombinedOutput()
	if err != nil || len(out) > 0 {
		t.Errorf("%v: %s", err, out)
	}
}

// The page of docker-proxy has all of its flags.
func TestProxyPage(t *testing.T) {
	dir := t.TempDir()
	if err := writeProxyPage(dir); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "slipway-docker-proxy.1")
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{".SH NAME\nslipway\\-docker\\-proxy ", "\\-host\\-port\\fR \\fIport\\fR\n", "\\-container\\-ip\\fR \\fIaddress\\fR\n", "SLIPWAY_SOCK\n"} {
		if !strings.Contains(string(b), want) {
			t.Errorf("no %q in\n%s", want, b)
		}
	}
	formatPages(t, []string{file})
}

// The page of slipway.toml has every setting and nothing of Markdown.
func TestConfigPage(t *testing.T) {
	dir := t.TempDir()
	if err := writeConfigPage(dir, filepath.Join("..", "..", "docs", "configuration.md")); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "slipway.toml.5")
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	page := string(b)
	values, err := config.Default().Values("")
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range values {
		if want := ".TP\n\\fB" + troff(v.Key) + "\\fR\n"; !strings.Contains(page, want) {
			t.Errorf("no %q", want)
		}
	}
	for _, want := range []string{".TH SLIPWAY.TOML 5 ", ".SH DESCRIPTION\n", ".SH ONLY FOR AN ENGINE\n", ".TP\n\\fBkind\\fR\n", "default: \\fB\"auto\"\\fR; allowed: \\fB\"auto\"\\fR,", "[engine.web]\n"} {
		if !strings.Contains(page, want) {
			t.Errorf("no %q", want)
		}
	}
	for _, bad := range []string{"`", "](", "|", "\n##"} {
		if strings.Contains(page, bad) {
			t.Errorf("%q is left of the Markdown", bad)
		}
	}
	formatPages(t, []string{file})
	if err := writeConfigPage(dir, filepath.Join(dir, "none.md")); err == nil {
		t.Error("a page of nothing")
	}
}

func TestTroff(t *testing.T) {
	for in, want := range map[string]string{
		"slipway run -- sh": `slipway run \-\- sh`,
		`a\b`:               `a\eb`,
		".so /etc/passwd":   `\&.so /etc/passwd`,
		"'tis":              `\&'tis`,
		"one\ntwo":          "one two",
	} {
		if got := troff(in); got != want {
			t.Errorf("troff(%q) = %q, want %q", in, got, want)
		}
	}
	const text = "One\nline.\n\n  a  table\n  of two\n\n.last"
	const want = "One\nline.\n.PP\n.nf\n  a  table\n  of two\n.fi\n.PP\n\\&.last\n"
	if got := troffText(text); got != want {
		t.Errorf("troffText: %q, want %q", got, want)
	}
}
