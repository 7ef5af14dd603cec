package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/slipway-net/slipway/internal/api"
	"github.com/slipway-net/slipway/internal/daemon"
)

// askTimeout is how long an engine may take to answer a listing.
const askTimeout = 5 * time.Second

// answer is what one engine said.
type answer[T any] struct {
	engine string
	value  T
	err    error
}

// askEach asks every running engine, or those named, at the same time. An engine that
// ended meanwhile is left out, unless it was named.
func askEach[T any](ctx context.Context, names []string, ask func(context.Context, *api.Client) (T, error)) ([]answer[T], error) {
	named := len(names) > 0
	if !named {
		var err error
		if names, err = daemon.Engines(); err != nil {
			return nil, err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	all := make([]answer[T], len(names))
	var wg sync.WaitGroup
	for i, name := range names {
		all[i].engine = name
		c, err := daemon.ClientOf(name)
		if err != nil {
			return nil, err
		}
		wg.Go(func() {
			defer c.Close()
			all[i].value, all[i].err = ask(ctx, c)
		})
	}
	wg.Wait()
	kept := all[:0]
	for _, a := range all {
		if named && a.err != nil {
			return nil, a.err
		}
		if !errors.Is(a.err, api.ErrNotRunning) {
			kept = append(kept, a)
		}
	}
	return kept, nil
}

func askStatus(ctx context.Context, c *api.Client) (api.Status, error) { return c.Status(ctx) }

// listed is one engine in the list.
type listed struct {
	Name          string   `json:"name"`
	State         string   `json:"state"`           // "running" or "no answer"
	Error         string   `json:"error,omitempty"` // why there is no answer
	Mode          string   `json:"mode,omitempty"`
	PID           int      `json:"pid,omitempty"`
	UptimeSeconds float64  `json:"uptime_seconds,omitempty"`
	Flows         int      `json:"flows"`
	Command       []string `json:"command,omitempty"`
}

func newLs() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "ls",
		Short: "List this user's running engines",
		Args:  words(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			answers, err := askEach(cmd.Context(), nil, askStatus)
			if err != nil {
				return err
			}
			list := make([]listed, 0, len(answers))
			for _, a := range answers {
				list = append(list, listedOf(a))
			}
			if asJSON {
				err = printJSON(cmd.OutOrStdout(), map[string]any{"engines": list})
				return errors.Join(err, silence(answers))
			}
			rows := [][]string{{"NAME", "STATE", "MODE", "PID", "UP", "FLOWS", "COMMAND"}}
			for _, l := range list {
				rows = append(rows, l.row())
			}
			err = printTable(cmd.OutOrStdout(), rows)
			return errors.Join(err, reportSilent(cmd, answers))
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON document")
	return cmd
}

func listedOf(a answer[api.Status]) listed {
	if a.err != nil {
		return listed{Name: a.engine, State: "no answer", Error: a.err.Error()}
	}
	e := a.value.Engine
	l := listed{Name: a.engine, State: "running", Mode: e.Mode, PID: e.PID, UptimeSeconds: e.UptimeSeconds, Command: e.Command}
	for _, f := range a.value.Flows {
		l.Flows += f.Live
	}
	return l
}

func (l listed) row() []string {
	if l.Error != "" {
		return []string{l.Name, l.State}
	}
	up := time.Duration(l.UptimeSeconds * float64(time.Second))
	return []string{l.Name, l.State, l.Mode, strconv.Itoa(l.PID), ageText(up), strconv.Itoa(l.Flows), printable(strings.Join(l.Command, " "))}
}

// reportSilent says of each engine that did not answer why, where a listing shows the
// others only. It returns what silence does.
func reportSilent[T any](cmd *cobra.Command, answers []answer[T]) error {
	hints := make(map[string]bool)
	for _, a := range answers {
		if a.err != nil {
			fmt.Fprintf(cmd.ErrOrStderr(), "slipway: engine %s: %v\n", a.engine, a.err)
			if hint, _ := advice(a.err); hint != "" && !hints[hint] {
				hints[hint] = true
				fmt.Fprintf(cmd.ErrOrStderr(), "hint: %s\n", hint)
			}
		}
	}
	return silence(answers)
}

// silence is the exit status of a listing in which an engine is missing that did not
// answer, as an error, or nil.
func silence[T any](answers []answer[T]) error {
	for _, a := range answers {
		if a.err != nil {
			return statusError(daemon.CodeFailed)
		}
	}
	return nil
}

func newStatus() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "status [ENGINE]",
		Short: "Show the health of an engine, or of all",
		Long:  "Show paths in use and why, link offloads, DNS servers, ping, limits and everything dropped.",
		Args:  words(0, 1, ""), ValidArgsFunction: completeEngine,
		RunE: func(cmd *cobra.Command, args []string) error {
			answers, err := askEach(cmd.Context(), args, askStatus)
			if err != nil {
				return err
			}
			all := make([]api.Status, 0, len(answers))
			for _, a := range answers {
				if a.err == nil {
					all = append(all, a.value)
				}
			}
			silent := reportSilent(cmd, answers)
			switch {
			case asJSON && len(args) == 1:
				return printJSON(cmd.OutOrStdout(), all[0])
			case asJSON:
				return errors.Join(printJSON(cmd.OutOrStdout(), map[string]any{"engines": all}), silent)
			case len(all) == 0 && silent == nil:
				fmt.Fprintln(cmd.OutOrStdout(), "no engine is running")
			}
			for i, s := range all {
				if i > 0 {
					fmt.Fprintln(cmd.OutOrStdout())
				}
				if err := printStatus(cmd.OutOrStdout(), s); err != nil {
					return err
				}
			}
			return silent
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON document")
	return cmd
}
