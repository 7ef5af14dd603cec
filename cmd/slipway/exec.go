package main

import (
	"errors"
	"os"
	"os/signal"

	"github.com/spf13/cobra"

	"github.com/slipway-net/slipway/internal/api"
	"github.com/slipway-net/slipway/internal/config"
	"github.com/slipway-net/slipway/internal/daemon"
)

func newExec(code *int) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "exec ENGINE -- CMD [ARG...]",
		Short: "Run a command inside a running engine's namespaces",
		Long: "Run CMD inside all namespaces of a running engine, with this terminal, working directory\n" +
			"and environment. The exit status is that of CMD.",
		Args: words(2, -1, "ENGINE or CMD"), ValidArgsFunction: completeEngine,
		RunE: func(cmd *cobra.Command, args []string) error {
			if cmd.ArgsLenAtDash() == 0 {
				return usage(cmd, errors.New("ENGINE is missing"))
			}
			command := args[1:]
			if command[0] == "--" {
				command = command[1:]
			}
			if len(command) == 0 {
				return usage(cmd, errors.New("CMD is missing"))
			}
			if err := config.CheckName(args[0]); err != nil {
				return usage(cmd, err)
			}
			c, err := daemon.ClientOf(args[0])
			if err != nil {
				return err
			}
			defer c.Close()
			req := api.ExecRequest{Args: command, Env: os.Environ()}
			if dir, err := os.Getwd(); err == nil {
				req.Dir = api.Word(dir)
			}
			signals := make(chan os.Signal, 16)
			for _, sig := range forwarded {
				if !signal.Ignored(sig) { // HUP under nohup, for one
					signal.Notify(signals, sig)
				}
			}
			defer signal.Stop(signals)
			*code, err = execOn(cmd.Context(), c, req, signals)
			return err
		},
	}
	cmd.Flags().SetInterspersed(false)
	return cmd
}
