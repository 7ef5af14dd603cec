package main

import (
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/slipway-net/slipway/internal/config"
	"github.com/slipway-net/slipway/internal/daemon"
	"github.com/slipway-net/slipway/internal/probe"
)

func newDemo(code *int) *cobra.Command {
	var f engineFlags
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Try everything in a fresh engine, against echo services on this host",
		Long: "Start echo services on this host, and an engine in which slipway probe talks to them: a line for\n" +
			"each kind of traffic. On a terminal a shell inside the engine follows. It needs no network, no\n" +
			"configuration and nothing installed, and leaves nothing behind. The exit status is 1 when a check failed.",
		Args: words(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			services, err := probe.Serve(cmd.Context(), nil)
			if err != nil {
				return err
			}
			defer services.Close()
			o, err := demoOptions(services.Targets())
			if err != nil {
				return err
			}
			o.Rootless = f.rootless
			*code, err = daemon.Run(cmd.Context(), o)
			return err
		},
	}
	f.addRootless(cmd)
	return cmd
}

// demoOptions is an engine that probes t, from defaults only: nothing that this host has
// configured shall decide whether a demonstration works.
func demoOptions(t probe.Targets) (daemon.Options, error) {
	c := config.Default()
	if err := c.Set("host_access", demoPorts(t), "demo"); err != nil {
		return daemon.Options{}, err
	}
	exe, err := os.Executable()
	if err != nil {
		return daemon.Options{}, fmt.Errorf("find our own program: %w", err)
	}
	command := []string{exe, "probe"}
	for _, word := range t.Args() {
		command = append(command, "--target", word)
	}
	if term.IsTerminal(int(os.Stdin.Fd())) && term.IsTerminal(int(os.Stdout.Fd())) {
		// The status of the checks is the demonstration's, whatever the shell's is.
		const script = `"$0" "$@"; status=$?; echo; echo "A shell inside the engine; leave it with exit."; "${SHELL:-/bin/sh}"; exit $status`
		command = append([]string{"/bin/sh", "-c", script}, command...)
	}
	return daemon.Options{
		Mode: daemon.ModeRun, Name: daemon.NameFor([]string{"demo"}, os.Getpid()), Config: c,
		Command: command, Env: os.Environ(), Version: version, Log: os.Stderr, Progress: progress(),
	}, nil
}

// demoPorts are the host's ports that the probe needs.
func demoPorts(t probe.Targets) string {
	var ports []string
	for _, p := range []uint16{t.HostTCP, t.HostUDP} {
		if p != 0 {
			ports = append(ports, fmt.Sprint(p))
		}
	}
	if len(ports) == 0 {
		return "none"
	}
	return strings.Join(ports, ",")
}
