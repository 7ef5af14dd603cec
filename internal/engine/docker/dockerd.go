package docker

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Names in an engine's state directory.
const (
	SocketName = "docker.sock"          // dockerd's API
	ConfigName = "daemon.json"          // an empty configuration, so that the host's is not read
	ProxyName  = "slipway-docker-proxy" // a link to our own binary
	pidName    = "docker.pid"
	execName   = "docker" // exec root
)

// DockerdOptions say which dockerd to start, and how.
type DockerdOptions struct {
	Program  string   // empty for dockerd
	StateDir string   // the engine's, for what ends with it
	DataRoot string   // images, volumes, containers; see DataRoot
	Rootless bool     // the engine's root is an ordinary user of the host
	Help     string   // what PROGRAM --help prints, to tell which options there are
	Extra    []string // further options; where one is ours too it is instead of ours

	// Configured are the keys of the configuration file that Extra names, see Configured:
	// dockerd takes no option that is there as well.
	Configured []string
}

// DataRoot is where the engine called name keeps its images and containers: below dataHome
// ($XDG_DATA_HOME) for a user, and for root, who has none, in /var/lib.
func DataRoot(name, dataHome string) string {
	if dataHome == "" {
		dataHome = "/var/lib"
	}
	return filepath.Join(dataHome, "slipway", name, "docker")
}

// ownPlaces is the beginning of a shell script: it covers what dockerd has at a place that
// no option moves. Plugins are in /run/docker: those of another dockerd are
// not this one's. A user cannot make that directory, but can cover it.
const ownPlaces = `mkdir -m 700 /run/docker 2>/dev/null
[ ! -d /run/docker ] || mount -t tmpfs -o mode=700 slipway /run/docker || exit 125
`

// ownContainerd covers the host's containerd. dockerd uses a containerd that it finds
// at the usual place, and starts one of its own otherwise. The host's cannot serve it: it
// sees neither the mounts nor the network in here, so containers would start without
// files, or in the host's network. One of its own puts sockets there, which a user may not
// in a directory of the host's.
const ownContainerd = `[ ! -S /run/containerd/containerd.sock ] && [ ! -d /run/containerd -o -w /run/containerd ] || mount -t tmpfs -o mode=711 slipway /run/containerd || exit 125
`

// dockerdOption is one of ours. Its long form is also its key in a configuration file.
type dockerdOption struct {
	long, short string // "data-root"; "" for no short form
	value       string // "" for a switch
}

// DockerdCommand returns the command line of a dockerd that shares no file with another
// one, listens in the state directory, and publishes through slipway. Before it starts
// ConfigName has to hold {} and ProxyName to be a link to slipway; for ports on addresses
// of the host net.ipv4.ip_nonlocal_bind and its IPv6 twin have to be on, since newer
// dockerds bind them inside. What is executed is DockerdWrapper and then this.
func DockerdCommand(o DockerdOptions) []string {
	in := func(name string) string { return filepath.Join(o.StateDir, name) }
	ours := []dockerdOption{
		{"config-file", "", in(ConfigName)},
		{"data-root", "g", o.DataRoot},
		{"exec-root", "", in(execName)},
		{"pidfile", "p", in(pidName)},
		{"host", "H", "unix://" + in(SocketName)},
		{"userland-proxy-path", "", in(ProxyName)},
	}
	current := knows(o.Help, "allow-direct-routing")
	if o.Rootless && !current {
		// Current ones take it for being inside RootlessKit, and do not start without its API.
		ours = append(ours, dockerdOption{long: "rootless"})
	}
	if current {
		// Clients come from outside, as far as dockerd can see, with their own addresses.
		ours = append(ours, dockerdOption{long: "allow-direct-routing"})
	}
	command := []string{cmp.Or(o.Program, "dockerd")}
	for _, c := range ours {
		switch {
		case c.long != "host" && (given(o.Extra, c) || slices.Contains(o.Configured, c.long)):
		case c.value == "":
			command = append(command, "--"+c.long)
		default:
			command = append(command, "--"+c.long, c.value)
		}
	}
	return append(command, o.Extra...)
}

// DockerdWrapper returns what has to be put in front of a DockerdCommand: it covers what the
// host has at dockerd's places, in the engine's mounts, and becomes dockerd. extra are the
// options of DockerdOptions.
func DockerdWrapper(extra []string) []string {
	script := ownPlaces
	if !given(extra, dockerdOption{long: "containerd"}) {
		script += ownContainerd
	}
	return []string{"/bin/sh", "-c", script + `exec "$@"`, "sh"}
}

// Prepare makes in a state directory what DockerdCommand's dockerd needs there. executable is
// ours.
func Prepare(stateDir, executable string) error {
	if err := os.WriteFile(filepath.Join(stateDir, ConfigName), []byte("{}\n"), 0o600); err != nil {
		return fmt.Errorf("write dockerd's configuration: %w", err)
	}
	link := filepath.Join(stateDir, ProxyName)
	if err := os.Remove(link); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("link dockerd's proxy: %w", err)
	}
	if err := os.Symlink(executable, link); err != nil {
		return fmt.Errorf("link dockerd's proxy: %w", err)
	}
	return nil
}

// Help returns what program, empty for dockerd, says about its options.
func Help(ctx context.Context, program string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, helpLimit)
	defer cancel()
	program = cmp.Or(program, "dockerd")
	out, err := exec.CommandContext(ctx, program, "--help").Output()
	if err != nil {
		return "", fmt.Errorf("ask %s for its options: %w", program, err)
	}
	return string(out), nil
}

// helpLimit is ample for a program that prints a text.
const helpLimit = 10 * time.Second

// knows reports whether a help text has an option.
func knows(help, long string) bool {
	return slices.Contains(strings.Fields(help), "--"+long)
}

// given reports whether args have an option, in one of the forms --long VALUE,
// --long=VALUE, -sVALUE and -s VALUE.
func given(args []string, c dockerdOption) bool {
	return slices.ContainsFunc(args, func(a string) bool {
		name, _, _ := strings.Cut(a, "=")
		return name == "--"+c.long || c.short != "" && strings.HasPrefix(a, "-"+c.short) && !strings.HasPrefix(a, "--")
	})
}

// Configured returns the keys of the configuration file that args name, read with read
// (os.ReadFile); none if they name none. dockerd itself tells what is wrong with a file.
func Configured(args []string, read func(string) ([]byte, error)) []string {
	return slices.Sorted(maps.Keys(configured(args, read)))
}

func configured(args []string, read func(string) ([]byte, error)) (file map[string]json.RawMessage) {
	b, err := read(configFile(args))
	if err != nil {
		return nil
	}
	json.Unmarshal(b, &file)
	return file
}

// ProxyOff reports whether a dockerd with the options args says nothing of its ports,
// because they or the configuration file that they name turn its proxy off, or choose
// another one. read is as in Configured.
func ProxyOff(args []string, read func(string) ([]byte, error)) bool {
	file := configured(args, read)
	if _, other := file["userland-proxy-path"]; other || given(args, dockerdOption{long: "userland-proxy-path"}) {
		return true
	}
	on := string(file["userland-proxy"]) != "false"
	for _, a := range args {
		if v, ok := strings.CutPrefix(a, "--userland-proxy="); ok {
			b, err := strconv.ParseBool(v)
			on = b || err != nil // which dockerd refuses
		}
	}
	return !on
}

func configFile(args []string) string {
	file := ""
	for i, a := range args {
		if v, ok := strings.CutPrefix(a, "--config-file="); ok {
			file = v
		} else if a == "--config-file" && i+1 < len(args) {
			file = args[i+1]
		}
	}
	return file
}
