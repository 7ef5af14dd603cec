package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/slipway-net/slipway/internal/api"
	"github.com/slipway-net/slipway/internal/flow"
)

// watchEvery is how often --watch asks.
const watchEvery = time.Second

// engineFlow is a flow and whose it is.
type engineFlow struct {
	Engine string `json:"engine"`
	api.Flow
}

func newFlows() *cobra.Command {
	var asJSON, watch bool
	var limit int
	cmd := &cobra.Command{
		Use:   "flows [ENGINE]",
		Short: "List live flows, newest first",
		Long: "List the live flows of an engine, or of all, newest first. With --watch again every second:\n" +
			"on a terminal in place, in a pipe one listing after another, with --json one document a line.\n" +
			"An arrow to the left is a client of a published port, TARGET its address. OUT and IN are bytes\n" +
			"out of the guest and into it.",
		Args:              words(0, 1, ""),
		ValidArgsFunction: completeEngine,
		RunE: func(cmd *cobra.Command, args []string) error {
			if limit < 0 {
				return usage(cmd, fmt.Errorf("--limit: %d is not allowed: must be 0, all, or more", limit))
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			p := flowPrinter{cmd: cmd, json: asJSON, watch: watch}
			p.clear = watch && !asJSON && term.IsTerminal(int(os.Stdout.Fd()))
			return p.run(ctx, args, limit)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON document")
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "print again every second")
	cmd.Flags().IntVar(&limit, "limit", 0, "only the newest `N` of each engine")
	return cmd
}

// flowPrinter prints listings.
type flowPrinter struct {
	cmd                *cobra.Command
	json, watch, clear bool
}

func (p flowPrinter) run(ctx context.Context, engines []string, limit int) error {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	for {
		answers, err := askEach(ctx, engines, func(ctx context.Context, c *api.Client) (api.FlowList, error) { return c.Flows(ctx, limit) })
		if p.watch && ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		var silent error
		if !p.watch {
			silent = reportSilent(p.cmd, answers)
		}
		flows := merge(answers)
		if err := p.print(flows); err != nil || !p.watch {
			return errors.Join(err, silent)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// merge puts the flows of all engines into one list, newest first.
func merge(answers []answer[api.FlowList]) []engineFlow {
	flows := []engineFlow{}
	for _, a := range answers {
		for _, f := range a.value.Flows {
			flows = append(flows, engineFlow{a.engine, f})
		}
	}
	slices.SortStableFunc(flows, func(a, b engineFlow) int { return b.Started.Compare(a.Started) })
	return flows
}

func (p flowPrinter) print(flows []engineFlow) error {
	var b bytes.Buffer
	switch {
	case p.json && p.watch:
		if err := json.NewEncoder(&b).Encode(map[string]any{"flows": flows}); err != nil {
			return err
		}
	case p.json:
		if err := printJSON(&b, map[string]any{"flows": flows}); err != nil {
			return err
		}
	default:
		if p.clear {
			b.WriteString("\x1b[H\x1b[2J") // ECMA-48: cursor home, erase display
		}
		if err := printTable(&b, flowRows(flows)); err != nil {
			return err
		}
		if p.watch && !p.clear {
			b.WriteByte('\n')
		}
	}
	_, err := p.cmd.OutOrStdout().Write(b.Bytes())
	return err
}

func flowRows(flows []engineFlow) [][]string {
	rows := [][]string{{"ENGINE", "PROTO", "GUEST", "", "TARGET", "NAME", "DECISION", "PATH", "STATE", "AGE", "OUT", "IN"}}
	for _, f := range flows {
		rows = append(rows, []string{
			f.Engine, f.Proto.String(), f.Guest.String(), arrow(f.Flow), target(f.Flow), dash(printable(f.Name)), decision(f.Flow), string(f.Path), f.State,
			ageText(time.Since(f.Started)), bytesText(f.ToHost.Bytes), bytesText(f.ToGuest.Bytes),
		})
	}
	return rows
}

// arrow points from who began to who was reached.
func arrow(f api.Flow) string {
	if f.Decision == flow.Published {
		return "<-"
	}
	return "->"
}

// target is what the guest asked for, and what was dialled when that is another; of a
// published port the client.
func target(f api.Flow) string {
	text := f.Target.String()
	if f.Target.Port() == 0 { // a ping
		text = f.Target.Addr().String()
	}
	if f.Dialled.IsValid() && f.Dialled.Addr() != f.Target.Addr() {
		text += " (" + f.Dialled.String() + ")"
	}
	return text
}

func decision(f api.Flow) string {
	if f.Reason != "" {
		return string(f.Decision) + ": " + printable(f.Reason)
	}
	return string(f.Decision)
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
