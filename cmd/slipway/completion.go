package main

import (
	"strconv"

	"github.com/spf13/cobra"

	"github.com/slipway-net/slipway/internal/daemon"
)

// What a shell completes. An error completes nothing: nobody can read it there.

// completeEngine completes the first word to a running engine's name.
func completeEngine(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveDefault
	}
	names, err := daemon.Engines()
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// completeConfigured completes the first word to a configured engine's name.
func completeConfigured(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	c, err := loadConfig(cmd.Flag("config").Value.String())
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	return c.Names(), cobra.ShellCompDirectiveNoFileComp
}

// completePort completes the first word to a running engine's name, the others to IDs
// of its ports.
func completePort(cmd *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
	if len(args) == 0 {
		return completeEngine(cmd, args, word)
	}
	answers, err := askEach(cmd.Context(), args[:1], askPorts)
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	var ids []string
	for _, a := range answers {
		for _, p := range a.value {
			ids = append(ids, strconv.FormatUint(p.ID, 10)+"\t"+listenText(p))
		}
	}
	return ids, cobra.ShellCompDirectiveNoFileComp
}

// completeFlag completes a flag's value to one of words.
func completeFlag(cmd *cobra.Command, flag string, words ...string) {
	if err := cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp)); err != nil {
		panic(err) // there is no flag of that name
	}
}
