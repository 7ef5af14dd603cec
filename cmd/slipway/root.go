package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/slipway-net/slipway/internal/api"
	"github.com/slipway-net/slipway/internal/daemon"
)

// execute runs one command line and returns the exit status.
func execute(ctx context.Context, args []string) int {
	code := 0
	root := newRoot(&code)
	root.SetArgs(args)
	if err := root.ExecuteContext(ctx); err != nil {
		return report(os.Stderr, err)
	}
	return code
}

// newRoot makes the command tree. A command that ends well sets *code, the exit status.
func newRoot(code *int) *cobra.Command {
	root := &cobra.Command{
		Use:   "slipway",
		Short: "Run a container engine in a network of its own, behind the host's sockets",
		Long: "slipway puts a container engine, or any command, into its own network namespace and\n" +
			"replays each of its connections through an ordinary socket of the host: to the host,\n" +
			"its firewall and its VPN it is one more program.",
		SilenceErrors: true,

		SuggestionsMinimumDistance: 2,
		SilenceUsage:               true,
		Args:                       unknownCommand,
		RunE:                       func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error { return usage(cmd, err) })
	root.AddCommand(
		newRun(code), newUp(code), newAttach(code), newExec(code),
		newLs(), newStatus(), newFlows(), newPorts(), newDocker(),
		newProbe(), newDemo(code), newDoctor(),
		newConfig(), newVersion(), newMan(),
	)
	return root
}

// unknownCommand is what is left when no command has the name.
func unknownCommand(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	p := &daemon.Problem{Err: fmt.Errorf("run command on %q: there is none of that name", args[0]), Hint: "slipway --help lists the commands"}
	if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
		p.Hint = "did you mean: slipway " + strings.Join(near, ", slipway ")
	}
	return p
}

// usage makes an error of a command line that is wrong.
func usage(cmd *cobra.Command, err error) error {
	return &daemon.Problem{
		Err:  fmt.Errorf("read command line on %s: %w", cmd.CommandPath(), err),
		Hint: cmd.CommandPath() + " --help",
	}
}

// words returns an Args function that wants at least low and at most high words; high
// below 0 means any number. what names them for the message.
func words(low, high int, what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) < low:
			return usage(cmd, errors.New(what+" is missing"))
		case high >= 0 && len(args) > high:
			return usage(cmd, fmt.Errorf("%q is too much", args[high]))
		}
		return nil
	}
}

// report writes an error, one line for each problem, and its hint. It returns the exit
// status that the error stands for.
func report(w io.Writer, err error) int {
	if status := statusError(0); errors.As(err, &status) {
		return int(status)
	}
	hint, code := advice(err)
	for line := range strings.Lines(err.Error()) {
		fmt.Fprintf(w, "slipway: %s\n", strings.TrimRight(line, "\n"))
	}
	if hint != "" {
		fmt.Fprintf(w, "hint: %s\n", hint)
	}
	return code
}

// advice is what a user can do about an error, "" for nothing, and the exit status.
func advice(err error) (hint string, code int) {
	var p *daemon.Problem
	var ae *api.Error
	switch {
	case errors.As(err, &p):
		hint, code = p.Hint, max(p.Code, 0)
	case errors.As(err, &ae):
		hint, code = ae.Hint, ae.Code
	case errors.Is(err, api.ErrNotRunning):
		hint = "slipway ls lists the running engines"
	}
	if code == 0 {
		code = daemon.CodeFailed
	}
	return hint, code
}

// statusError ends the program with an exit status when everything is said already.
type statusError int

// Error implements error.
func (s statusError) Error() string { return fmt.Sprintf("exit status %d", int(s)) }
