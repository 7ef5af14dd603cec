package main

import (
	"fmt"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/slipway-net/slipway/internal/config"
	"github.com/slipway-net/slipway/internal/daemon"
	"github.com/slipway-net/slipway/internal/probe"
)

func newVersion() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  words(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if asJSON {
				return printJSON(cmd.OutOrStdout(), map[string]string{
					"version": version, "go": runtime.Version(), "os": runtime.GOOS, "arch": runtime.GOARCH,
				})
			}
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "slipway %s (%s %s/%s)\n", version, runtime.Version(), runtime.GOOS, runtime.GOARCH)
			return err
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON document")
	return cmd
}

func newConfig() *cobra.Command {
	cmd := &cobra.Command{Use: "config", Short: "Look at the configuration", Args: unknownCommand,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() }}
	cmd.AddCommand(newConfigShow())
	return cmd
}

func newConfigShow() *cobra.Command {
	var f engineFlags
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "show [ENGINE]",
		Short: "Print the settings in effect and where each comes from",
		Long: "Print every setting, as TOML, and where it comes from: a line of the configuration, a flag given\n" +
			"here, or the default. With ENGINE its table [engine.NAME] goes over the general part. An ENGINE that\n" +
			"has no table and is not running is an error, with exit status 125: the name may be mistyped.\n" +
			"Flags that a running engine was started with are not known here.",
		Args: words(0, 1, ""), ValidArgsFunction: completeConfigured,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := f.load(cmd)
			if err != nil {
				return err
			}
			name := ""
			if len(args) == 1 {
				if name = args[0]; config.CheckName(name) != nil {
					return usage(cmd, config.CheckName(name))
				}
				if err := checkKnown(c, name); err != nil {
					return err
				}
			}
			return showConfig(cmd, c, name, asJSON)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON document")
	f.add(cmd)
	return cmd
}

// checkKnown returns an error if no engine of that name is configured, nor running.
func checkKnown(c *config.Config, name string) error {
	configured := c.Names()
	running, err := daemon.Engines()
	if slices.Contains(configured, name) || slices.Contains(running, name) {
		return nil
	}
	p := &daemon.Problem{
		Err:  fmt.Errorf("show configuration on %s: no such engine is configured or running", name),
		Hint: "without a name, slipway config show prints what holds for every engine that has no table [engine.NAME]",
	}
	if err != nil && runtime.GOOS == "linux" { // elsewhere none can run
		p.Err = fmt.Errorf("show configuration on %s: it is not configured, and running engines cannot be listed: %w", name, err)
	}
	if len(configured) > 0 {
		p.Hint = "configured: " + strings.Join(configured, ", ") + "; without a name, slipway config show prints what holds for all others"
	}
	return p
}

func showConfig(cmd *cobra.Command, c *config.Config, name string, asJSON bool) error {
	values, err := c.Values(name)
	if err != nil {
		return err
	}
	own := c.Own(name)
	if asJSON {
		out := map[string]any{"file": c.File(), "settings": values, "engines": c.Names()}
		if own != nil {
			out["engine"] = own
		}
		return printJSON(cmd.OutOrStdout(), out)
	}
	rows := make([][]string, 0, len(values))
	for _, v := range values {
		rows = append(rows, []string{v.Key + " = " + v.Value, "# " + v.Source})
	}
	if own != nil {
		rows = append(rows, []string{"", ""}, []string{"[engine." + tomlKey(name) + "]"})
	}
	for _, v := range own {
		rows = append(rows, []string{v.Key + " = " + v.Value, "# " + v.Source})
	}
	return printTable(cmd.OutOrStdout(), rows)
}

// tomlKey writes an engine's name as a key, in quotes if it has a dot.
func tomlKey(name string) string {
	if strings.Contains(name, ".") {
		return strconv.Quote(name)
	}
	return name
}

func newProbe() *cobra.Command {
	var asJSON bool
	var targets probe.Targets
	cmd := &cobra.Command{
		Use:   "probe",
		Short: "Try DNS, TCP, UDP, ping and host access from inside an engine",
		Long: "Try every kind of traffic from where it is started, which should be inside an engine, one\n" +
			"line for each with its time. The exit status is 1 when one failed.\n\n" +
			"Further targets are tried when they are given with --target: tcp4, tcp6, udp4, udp6 with\n" +
			"ADDRESS:PORT of an echo service, ping4, ping6 with ADDRESS, host-tcp, host-udp with a port of the\n" +
			"host's loopback that host_access opens, name with a name to resolve.",
		Example: "  slipway exec a -- slipway probe\n  slipway exec a -- slipway probe --target name=example.org --target ping4=198.51.100.7",
		Args:    words(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			results := []probe.Result{}
			err := probe.Run(cmd.Context(), targets, func(r probe.Result) {
				results = append(results, r)
				if !asJSON {
					fmt.Fprintln(cmd.OutOrStdout(), probe.Format(r))
				}
			})
			if asJSON {
				if err := printJSON(cmd.OutOrStdout(), map[string]any{"ok": err == nil, "checks": results}); err != nil {
					return err
				}
			}
			if err != nil {
				return &daemon.Problem{Err: err, Code: 1}
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON document")
	cmd.Flags().Var(&targets, "target", "`KIND=VALUE` to try besides; may be repeated")
	return cmd
}
