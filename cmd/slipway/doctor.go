package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/slipway-net/slipway/internal/doctor"
)

func newDoctor() *cobra.Command {
	var o doctor.Options
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Find out whether this host can run slipway, and what mends it",
		Long: "Look at what slipway needs of this host, a line each, with the exact command that mends what is\n" +
			"missing. Nothing is changed. The exit status is 1 when engines cannot start.",
		Args: words(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			findings := doctor.Check(cmd.Context(), o)
			failed := doctor.Failed(findings)
			if asJSON {
				if err := printJSON(cmd.OutOrStdout(), map[string]any{"ok": !failed, "findings": findings}); err != nil {
					return err
				}
			} else {
				for _, f := range findings {
					fmt.Fprintln(cmd.OutOrStdout(), doctor.Format(f))
				}
			}
			if failed {
				return statusError(1)
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON document")
	cmd.Flags().BoolVar(&o.Rootless, "rootless", false, "as root, ask about engines in a user namespace; others always do")
	return cmd
}
