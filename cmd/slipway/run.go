package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/slipway-net/slipway/internal/config"
	"github.com/slipway-net/slipway/internal/daemon"
)

// engineFlags are what run, up and attach have in common.
type engineFlags struct {
	config   string
	publish  []string
	rootless bool
}

// settingFlags are flags that set a key of the configuration. words are what a shell
// can complete.
var settingFlags = []struct {
	flag, key, help string
	words           []string
}{
	{"path", "path", "how flows travel, `auto|kernel|netstack`", []string{config.PathAuto, config.PathKernel, config.PathNetstack}},
	{"host-access", "host_access", "`PORTS` of the host's loopback that the guest reaches: none, all, or a list like 80,8000-8010", []string{"none", "all"}},
	{"isolate", "isolate", "`LIST` of what is isolated: net, which always is, mount, pid", []string{"net", "mount", "pid", "mount,pid"}},
	{"log-level", "log_level", "least level that is logged, `debug|info|warn|error`", []string{"debug", "info", "warn", "error"}},
	{"publish-bind", "publish_bind", "`WHERE` published ports listen: as-asked, loopback-default, loopback-only",
		[]string{config.BindAsAsked, config.BindLoopbackDefault, config.BindLoopbackOnly}},
	{"source-ip", "source_ip", "which client address the guest sees behind a published port, `preserve|gateway`", sourceWords},
}

// autoWord is the value of --publish that stands for publish_auto.
const autoWord = "auto"

// add adds the flags, but for those of settingFlags that mean nothing to the command.
func (f *engineFlags) add(cmd *cobra.Command, without ...string) {
	cmd.Flags().StringVar(&f.config, "config", "", "configuration `FILE`, instead of slipway.toml in the usual places")
	for _, s := range settingFlags {
		if slices.Contains(without, s.flag) {
			continue
		}
		cmd.Flags().String(s.flag, "", s.help)
		completeFlag(cmd, s.flag, s.words...)
	}
	cmd.Flags().StringArrayVarP(&f.publish, "publish", "p", nil,
		"`SPEC` to publish: [HOSTIP:]HOSTPORT:[GUESTIP:]GUESTPORT[/tcp|udp], or auto, what the guest listens on; may be repeated, or a list with commas")
	completeFlag(cmd, "publish", autoWord)
}

func (f *engineFlags) addRootless(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&f.rootless, "rootless", false, "give the guest a user namespace of its own also as root; others always get one")
}

// load reads the configuration and lays the flags over it.
func (f *engineFlags) load(cmd *cobra.Command) (*config.Config, error) {
	c, err := loadConfig(f.config)
	if err != nil {
		return nil, err
	}
	for _, s := range settingFlags {
		flag := cmd.Flags().Lookup(s.flag)
		if flag == nil || !flag.Changed {
			continue
		}
		if err := c.Set(s.key, flag.Value.String(), "--"+s.flag); err != nil {
			return nil, usage(cmd, err)
		}
	}
	if err := f.setPublish(c); err != nil {
		return nil, usage(cmd, err)
	}
	return c, nil
}

// setPublish lays --publish over the configuration: its ports are instead of the
// file's, and auto leaves those alone.
func (f *engineFlags) setPublish(c *config.Config) error {
	const source = "--publish"
	var specs []string
	for _, s := range strings.Split(strings.Join(f.publish, ","), ",") {
		if s != autoWord {
			specs = append(specs, s)
		} else if err := c.Set("publish_auto", "true", source); err != nil {
			return err
		}
	}
	if len(f.publish) == 0 {
		return nil
	}
	if _, err := parseSpecs(specs); err != nil {
		return fmt.Errorf("%s: %w", source, err)
	}
	if len(specs) == 0 {
		return nil
	}
	return c.Set("publish", strings.Join(specs, ","), source)
}

// loadConfig reads the file at path, or for "" the one in the usual places, if any.
func loadConfig(path string) (*config.Config, error) {
	if path == "" {
		if path = config.Find(os.Geteuid()); path == "" {
			return config.Default(), nil
		}
	}
	c, err := config.Load(path)
	var problems config.Problems
	if errors.As(err, &problems) {
		return nil, &daemon.Problem{Err: err, Hint: "mend the file: with an error in it nothing is started"}
	}
	return c, err
}

// options are those that every kind of engine has.
func (f *engineFlags) options(cmd *cobra.Command, mode daemon.Mode, name string) (daemon.Options, error) {
	c, err := f.load(cmd)
	if err != nil {
		return daemon.Options{}, err
	}
	if err := config.CheckName(name); err != nil {
		return daemon.Options{}, usage(cmd, err)
	}
	o := daemon.Options{
		Mode: mode, Name: name, Config: c, Rootless: f.rootless,
		Env: os.Environ(), Version: version, Log: os.Stderr, Progress: progress(),
	}
	if c.File() != "" {
		o.Reload = func() (*config.Config, error) { return f.load(cmd) }
	}
	return o, nil
}

// progress is where a person looks who waits; nil when nobody does.
func progress() io.Writer {
	if term.IsTerminal(int(os.Stderr.Fd())) {
		return os.Stderr
	}
	return nil
}

func newRun(code *int) *cobra.Command {
	var f engineFlags
	var name string
	cmd := &cobra.Command{
		Use:   "run [flags] -- CMD [ARG...]",
		Short: "Run a command in a fresh isolated namespace",
		Long: "Run CMD in a fresh network namespace whose traffic leaves through this host's sockets.\n" +
			"The exit status is that of CMD, 128+n after signal n; 125 when slipway itself failed\n" +
			"before CMD started, 126 and 127 when CMD cannot be executed or is not found.\n" +
			"TERM, HUP, QUIT, USR1, USR2 and WINCH are passed on, INT when there is no terminal.\n" +
			"stop_timeout (20 s) after TERM, or at a second TERM, what is left is killed.",
		Example: "  slipway run -- curl http://example.org/\n  slipway run --name a --host-access 5432 -- dockerd\n" +
			"  slipway run -p 8080:80 -p 127.0.0.1:5353:53/udp -- my-server",
		Args: words(1, -1, "CMD"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if name == "" {
				name = daemon.NameFor(args, os.Getpid())
			}
			o, err := f.options(cmd, daemon.ModeRun, name)
			if err != nil {
				return err
			}
			o.Command = args
			*code, err = daemon.Run(cmd.Context(), o)
			return err
		},
	}
	cmd.Flags().SetInterspersed(false) // CMD's flags are its own, also without --
	cmd.Flags().StringVar(&name, "name", "", "`NAME` of the engine; without one it is made of CMD and the pid")
	f.add(cmd)
	f.addRootless(cmd)
	return cmd
}

func newUp(code *int) *cobra.Command {
	var f engineFlags
	cmd := &cobra.Command{
		Use:   "up [ENGINE]",
		Short: "Start a configured engine and stay in the foreground",
		Long: "Start the engine that has a table [engine.NAME] in the configuration, with a command or with\n" +
			"kind = \"dockerd\", and stay in the foreground, as a service manager wants it. ENGINE may be\n" +
			"left out when there is only one. HUP reads the configuration again: log_level and what is\n" +
			"published change at once, of other changes slipway says that they need a restart.",
		Args:              words(0, 1, ""),
		ValidArgsFunction: completeConfigured,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := f.load(cmd)
			if err != nil {
				return err
			}
			name, err := chooseConfigured(c, args)
			if err != nil {
				return err
			}
			o, err := f.options(cmd, daemon.ModeUp, name)
			if err != nil {
				return err
			}
			e, err := o.Config.Engine(name)
			if err != nil {
				return err
			}
			o.Command, o.Dir = e.Command, e.Directory
			o.Env = setEnv(o.Env, e.Environment)
			*code, err = daemon.Run(cmd.Context(), o)
			return err
		},
	}
	f.add(cmd)
	f.addRootless(cmd)
	return cmd
}

// setEnv returns env with the variables of own. A name may not appear twice: the C
// library and Go take the first value, shells and Python the last.
func setEnv(env []string, own map[string]string) []string {
	out := slices.DeleteFunc(slices.Clone(env), func(e string) bool {
		name, _, _ := strings.Cut(e, "=")
		_, set := own[name]
		return set
	})
	for _, name := range slices.Sorted(maps.Keys(own)) {
		out = append(out, name+"="+own[name])
	}
	return out
}

// chooseConfigured finds the configured engine that is meant.
func chooseConfigured(c *config.Config, args []string) (string, error) {
	names := c.Names()
	hint := "configured: " + strings.Join(names, ", ")
	switch {
	case len(names) == 0:
		file := cmp.Or(c.File(), config.Usual(os.Geteuid()))
		hint = "write a table [engine.NAME] with a command, or with kind = \"dockerd\", into " + file + "; slipway run needs none"
	case len(args) == 0 && len(names) > 1:
		return "", &daemon.Problem{Err: errors.New("start engine: which one is not said"), Hint: hint}
	}
	if len(args) == 0 && len(names) == 1 {
		args = names
	}
	if len(args) == 0 {
		return "", &daemon.Problem{Err: errors.New("start engine: none is configured"), Hint: hint}
	}
	e, err := c.Engine(args[0])
	if err != nil {
		return "", err
	}
	if len(e.Command) == 0 && e.Kind == config.KindCommand {
		return "", &daemon.Problem{Err: fmt.Errorf("start engine on %s: it is not configured with a command", args[0]), Hint: hint}
	}
	return args[0], nil
}

func newAttach(code *int) *cobra.Command {
	var f engineFlags
	var name, netns string
	var pid int
	cmd := &cobra.Command{
		Use:   "attach --pid N | --netns PATH",
		Short: "Serve a namespace somebody else made, until it goes away",
		Args:  words(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			byPID, byPath := cmd.Flags().Changed("pid"), cmd.Flags().Changed("netns")
			if byPID == byPath {
				return usage(cmd, errors.New("exactly one of --pid and --netns is needed"))
			}
			if byPID && pid <= 0 || byPath && netns == "" {
				return usage(cmd, errors.New("a process number is above 0, and a path is not empty"))
			}
			if name == "" {
				name = daemon.NameFor([]string{"attach"}, os.Getpid())
			}
			o, err := f.options(cmd, daemon.ModeAttach, name)
			if err != nil {
				return err
			}
			o.PID, o.NetNS = pid, netns
			*code, err = daemon.Run(cmd.Context(), o)
			return err
		},
	}
	cmd.Flags().IntVar(&pid, "pid", 0, "process `N` is in the namespace")
	cmd.Flags().StringVar(&netns, "netns", "", "`PATH` of the namespace, such as /run/netns/NAME")
	cmd.Flags().StringVar(&name, "name", "", "`NAME` of the engine; without one it is made of the pid")
	f.add(cmd, "isolate") // the namespaces are somebody else's
	return cmd
}
