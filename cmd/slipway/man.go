package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// The manual: a page for each command, in the language of man(7), made of what the
// commands say of themselves. By hand rather than by cobra/doc: that one comes with a
// Markdown parser, which each of the many small processes of an engine would have to start.

// What the page slipway(1) has besides.
const (
	manFiles = `.SH FILES
.TP
.I /etc/slipway/slipway.toml
.TQ
.I $XDG_CONFIG_HOME/slipway/slipway.toml
The configuration of root, and of other users; see
.BR slipway.toml (5).
.TP
.I /run/slipway/ENGINE/
.TQ
.I $XDG_RUNTIME_DIR/slipway/ENGINE/
What belongs to a running engine: its control sockets, its process id.
.TP
.I PREFIX/share/doc/slipway/
The documents, where
.B make install
was given that PREFIX.
`
	manStatus = `.SH EXIT STATUS
The command's own, 128+n if signal n ended it.
125 when slipway itself failed before the command started, 126 when the command cannot be executed,
127 when it is not found.
`
)

// newMan is for packagers, and hidden.
func newMan() *cobra.Command {
	return &cobra.Command{
		Use:    "man DIR CONFIGURATION.md",
		Short:  "Write the manual pages into man1 and man5 of a directory",
		Args:   words(2, 2, "DIR or CONFIGURATION.md"),
		Hidden: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			commands, files := filepath.Join(args[0], "man1"), filepath.Join(args[0], "man5")
			for _, dir := range []string{commands, files} {
				if err := os.MkdirAll(dir, 0o755); err != nil {
					return fmt.Errorf("make directory for manual pages: %w", err)
				}
			}
			if err := writeConfigPage(files, args[1]); err != nil {
				return err
			}
			if err := writeProxyPage(commands); err != nil {
				return err
			}
			return writeManual(commands, cmd.Root())
		},
	}
}

// writeManual writes the page of a command and those of the commands below it.
func writeManual(dir string, cmd *cobra.Command) error {
	path := filepath.Join(dir, manName(cmd)+".1")
	if err := os.WriteFile(path, []byte(manPage(cmd)), 0o644); err != nil {
		return fmt.Errorf("write manual page: %w", err)
	}
	for _, sub := range documented(cmd) {
		if err := writeManual(dir, sub); err != nil {
			return err
		}
	}
	return nil
}

// documented are the commands below cmd that have pages.
func documented(cmd *cobra.Command) (list []*cobra.Command) {
	for _, sub := range cmd.Commands() {
		if sub.IsAvailableCommand() && !sub.IsAdditionalHelpTopicCommand() && sub.Name() != "help" {
			list = append(list, sub)
		}
	}
	return list
}

// manName is slipway-ports-add.
func manName(cmd *cobra.Command) string { return strings.ReplaceAll(cmd.CommandPath(), " ", "-") }

func manPage(cmd *cobra.Command) string {
	var b strings.Builder
	fmt.Fprintf(&b, ".TH %s 1 \"\" \"slipway %s\" \"User Commands\"\n", troff(strings.ToUpper(manName(cmd))), troff(version))
	fmt.Fprintf(&b, ".SH NAME\n%s \\- %s\n", troff(manName(cmd)), troff(cmd.Short))
	fmt.Fprintf(&b, ".SH SYNOPSIS\n.B %s\n", troff(cmd.UseLine()))
	if len(documented(cmd)) > 0 {
		fmt.Fprintf(&b, ".br\n.B %s COMMAND\n", troff(cmd.CommandPath()))
	}
	long := cmd.Long
	if long == "" {
		long = cmd.Short + "."
	}
	b.WriteString(".SH DESCRIPTION\n" + troffText(long))
	manCommands(&b, cmd)
	manOptions(&b, cmd)
	if cmd.Example != "" {
		b.WriteString(".SH EXAMPLES\n" + troffBlock(cmd.Example))
	}
	if cmd.HasParent() {
		fmt.Fprintf(&b, ".SH SEE ALSO\n.BR %s (1)\n", troff(manName(cmd.Parent())))
	} else {
		b.WriteString(manStatus + manFiles)
	}
	return b.String()
}

// manCommands lists the commands below cmd.
func manCommands(b *strings.Builder, cmd *cobra.Command) {
	for i, sub := range documented(cmd) {
		if i == 0 {
			b.WriteString(".SH COMMANDS\n")
		}
		fmt.Fprintf(b, ".TP\n.BR %s (1)\n%s\n", troff(manName(sub)), troff(sub.Short))
	}
}

// manOptions lists the flags.
func manOptions(b *strings.Builder, cmd *cobra.Command) {
	cmd.InitDefaultHelpFlag()
	b.WriteString(".SH OPTIONS\n")
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		if f.Hidden || f.Deprecated != "" {
			return
		}
		name, what := pflag.UnquoteUsage(f)
		b.WriteString(".TP\n")
		if f.Shorthand != "" {
			fmt.Fprintf(b, "\\fB\\-%s\\fR, ", troff(f.Shorthand))
		}
		fmt.Fprintf(b, "\\fB\\-\\-%s\\fR", troff(f.Name))
		if name != "" {
			fmt.Fprintf(b, " \\fI%s\\fR", troff(name))
		}
		b.WriteString("\n" + troff(what))
		switch f.DefValue {
		case "", "false", "0", "[]":
		default:
			b.WriteString(" (default " + troff(f.DefValue) + ")")
		}
		b.WriteString("\n")
	})
}

// troffText sets paragraphs, and lines that are indented as they are.
func troffText(s string) string {
	var b strings.Builder
	for i, paragraph := range strings.Split(strings.TrimSpace(s), "\n\n") {
		if i > 0 {
			b.WriteString(".PP\n")
		}
		if strings.HasPrefix(paragraph, " ") || strings.Contains(paragraph, "\n ") {
			b.WriteString(troffBlock(paragraph))
			continue
		}
		for line := range strings.Lines(paragraph) {
			b.WriteString(troff(strings.TrimRight(line, "\n")) + "\n")
		}
	}
	return b.String()
}

// troffBlock sets lines as they are.
func troffBlock(s string) string {
	var b strings.Builder
	b.WriteString(".nf\n")
	for line := range strings.Lines(strings.Trim(s, "\n")) {
		b.WriteString(troff(strings.TrimRight(line, "\n")) + "\n")
	}
	return b.String() + ".fi\n"
}

// troff has s mean itself: nothing in it is an escape, a hyphen that may be broken at, or a
// request.
func troff(s string) string {
	return atStart(escape(strings.ReplaceAll(s, "\n", " ")))
}

// escape is troff within a line.
func escape(s string) string { return strings.NewReplacer(`\`, `\e`, "-", `\-`).Replace(s) }
