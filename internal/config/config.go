// Package config is what a user may set: it reads slipway.toml strictly, lays it over
// the defaults and the command line over both, and says of every value where it came
// from.
//
// Default or Load, then Set for each flag, then Engine for the settings of one engine.
// A Settings value that Engine returned is valid.
package config

import (
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/slipway-net/slipway/internal/flow"
)

// Settings are the values of one engine. Every field has a key of the same name in the
// file, listed with its range in keys.go.
type Settings struct {
	// Path is how flows travel: one of the words below.
	Path string

	// HostAccess says which ports of the host's loopback the guest reaches through
	// the host address. The zero value is none.
	HostAccess HostAccess

	// HostAddresses is "allow", the host's other addresses are open like any, or
	// "as-host-access", they are treated as its loopback is.
	HostAddresses string

	// IPv4Subnet and IPv6Subnet are the guest's own networks: the first address is
	// the gateway's, the second the host's, the third the guest's.
	IPv4Subnet, IPv6Subnet netip.Prefix

	// MTU of the guest's device in bytes of IP packet, 1280..65535.
	MTU int

	// IsolateMount makes the guest's mounts private both ways, IsolatePID gives it a
	// pid namespace of its own.
	IsolateMount, IsolatePID bool

	// StopTimeout is how long a guest has between TERM and KILL, 0..1 h.
	StopTimeout time.Duration

	// LogLevel is the least level that is logged.
	LogLevel slog.Level

	// MaxDials bounds the TCP targets being dialled at one time, 1..65536, and as many
	// clients of published ports for whom the guest is.
	MaxDials int

	// MaxUDP bounds the UDP mappings, 1..1048576.
	MaxUDP int

	// Publish are the engine's own published ports, at most maxPublish.
	Publish []flow.PortSpec

	// PublishBind says what becomes of the address a port is asked for with: one of
	// the words below.
	PublishBind string

	// PublishPorts are the ports of the host that may be asked for; 0, any, always may.
	PublishPorts PortSet

	// SourceIP says which client address the guest sees behind a published port.
	SourceIP flow.Source

	// PublishAuto publishes what the guest listens on beyond its loopback.
	PublishAuto bool

	// DockerAPI is the absolute path of the socket of a container engine whose
	// containers' ports are published; empty for none.
	DockerAPI string
}

// Engine is one configured engine.
type Engine struct {
	Settings

	Name        string
	Kind        string            // KindCommand or KindDockerd
	Program     string            // for KindDockerd the dockerd, a path or a name to be found in PATH
	Command     []string          // what `slipway up` runs; empty when the file has none. For KindDockerd options besides ours
	Directory   string            // its working directory, absolute; empty keeps ours
	Environment map[string]string // added to slipway's own
}

// Config is a whole configuration: values for all engines, and what single engines
// have different. Make one with Default or Load; it is not safe for concurrent use
// while Set is called.
type Config struct {
	file    string             // the file read; empty for none
	base    layer              // top level of the file
	engines map[string]*engine // [engine.NAME]
	flags   layer              // the command line
}

// engine is one [engine.NAME] table.
type engine struct {
	layer
	kind        string // empty is KindCommand
	command     []string
	directory   string
	environment map[string]string
	sources     map[string]string // of kind, command and directory
}

// layer is what one source sets: by key, the value in its own notation and where it
// stands.
type layer map[string]setting

type setting struct {
	value  any
	source string // "slipway.toml:3" or "--mtu"
}

// Default returns the configuration of somebody who configured nothing.
func Default() *Config {
	return &Config{base: layer{}, engines: map[string]*engine{}, flags: layer{}}
}

func defaultSettings() Settings {
	return Settings{
		Path:          PathAuto,
		HostAddresses: "allow",
		IPv4Subnet:    netip.MustParsePrefix("192.168.65.0/24"),
		IPv6Subnet:    netip.MustParsePrefix("fdc4:f303:9324::/64"),
		MTU:           1500,
		StopTimeout:   20 * time.Second,
		LogLevel:      slog.LevelWarn,
		MaxDials:      4096,
		MaxUDP:        16384,
		PublishBind:   BindAsAsked,
		PublishPorts:  PortSet{All: true},
		SourceIP:      flow.SourcePreserve,
	}
}

// File is the path of the file that was read, or "".
func (c *Config) File() string { return c.file }

// Set lays one value over the file's, as a flag does. Value is in the notation of a
// command line: a list is separated by commas. source is where it comes from, "--mtu";
// the error names it and says what is allowed.
func (c *Config) Set(key, value, source string) error {
	k, ok := lookup(key)
	if !ok {
		return fmt.Errorf("%s: unknown setting", key)
	}
	s := defaultSettings()
	named := k
	named.name = source
	if bad := each(named.set(&s, value)); len(bad) > 0 {
		return bad[0] // a command line's error is one line
	}
	c.flags[key] = setting{value, source}
	return nil
}

// Names are the configured engines, in alphabetical order.
func (c *Config) Names() []string { return slices.Sorted(maps.Keys(c.engines)) }

// Engine returns the settings of the engine called name: those of its own table in
// the file, if it has one, over the file's general ones, under the command line's.
func (c *Config) Engine(name string) (Engine, error) {
	e := Engine{Name: name, Kind: KindCommand, Settings: defaultSettings()}
	for _, v := range c.values(name) {
		if v.layered == nil {
			continue
		}
		if err := v.key.set(&e.Settings, v.layered); err != nil {
			return Engine{}, fmt.Errorf("%s: %w", v.Source, err)
		}
	}
	if own := c.engines[name]; own != nil {
		if own.kind != "" {
			e.Kind = own.kind
		}
		e.Command = slices.Clone(own.command)
		if e.Kind == KindDockerd {
			e.Program, e.Command = splitDockerd(e.Command)
		}
		e.Directory = own.directory
		e.Environment = maps.Clone(own.environment)
	}
	return e, nil
}

// splitDockerd takes a program, if there is one, off the options for it.
func splitDockerd(words []string) (program string, options []string) {
	if len(words) > 0 && !strings.HasPrefix(words[0], "-") {
		return words[0], words[1:]
	}
	return KindDockerd, words
}

// Own returns what only the engine called name has and no key of Settings: kind,
// command and directory, those that are set. The environment may have secrets and is
// left out. It is empty when the file has no table for the engine.
func (c *Config) Own(name string) []Value {
	own := c.engines[name]
	if own == nil {
		return nil
	}
	e := Engine{Kind: own.kind, Command: own.command, Directory: own.directory}
	if e.Kind == "" {
		e.Kind = KindCommand
	}
	all := []Value{{Key: "kind", Value: quote(e.Kind), Source: "default"}}
	if len(e.Command) > 0 {
		all = append(all, Value{Key: "command", Value: quoteAll(e.Command)})
	}
	if e.Directory != "" {
		all = append(all, Value{Key: "directory", Value: quote(e.Directory)})
	}
	if len(own.environment) > 0 {
		all = append(all, Value{Key: "environment", Value: quoteTable(own.environment), Source: c.file})
	}
	for i, v := range all {
		if source, ok := own.sources[v.Key]; ok {
			all[i].Source = source
		}
	}
	return all
}

// Pinned reports whether somebody chose the value of key for the engine called name:
// what is only a default may be changed when the host's network asks for it.
func (c *Config) Pinned(name, key string) bool {
	for _, v := range c.values(name) {
		if v.Key == key {
			return v.layered != nil
		}
	}
	return false
}

// Value is one effective setting.
type Value struct {
	Key    string `json:"key"`
	Value  string `json:"value"`  // in TOML
	Source string `json:"source"` // "default", "FILE:LINE" or "--flag"

	key     key
	layered any // what a layer has; nil for a default
}

// Values returns the effective settings of the engine called name in a fixed order.
func (c *Config) Values(name string) ([]Value, error) {
	e, err := c.Engine(name)
	if err != nil {
		return nil, err
	}
	all := c.values(name)
	for i := range all {
		all[i].Value = all[i].key.get(&e.Settings)
	}
	return all, nil
}

// values finds each key's source; Value is not filled in.
func (c *Config) values(name string) []Value {
	layers := []layer{c.flags}
	if own := c.engines[name]; own != nil {
		layers = append(layers, own.layer)
	}
	layers = append(layers, c.base)
	all := make([]Value, 0, len(keys))
	for _, k := range keys {
		v := Value{Key: k.name, Source: "default", key: k}
		for _, l := range layers {
			if s, ok := l[k.name]; ok {
				v.layered, v.Source = s.value, s.source
				break
			}
		}
		all = append(all, v)
	}
	return all
}

// maxName keeps "/run/user/UID/slipway/NAME/guest.sock" well below the 107 bytes that a unix
// socket's path may have (sun_path in unix(7)), with room for a longer directory.
const maxName = 32

// The values of Settings.Path.
const (
	PathAuto     = "auto"     // kernel where it works
	PathKernel   = "kernel"   // an error where it does not
	PathNetstack = "netstack" //
)

// The values of Settings.PublishBind.
const (
	BindAsAsked         = "as-asked"
	BindLoopbackDefault = "loopback-default" // without an address: the loopback's instead of all
	BindLoopbackOnly    = "loopback-only"    // all addresses become the loopback's, others are refused
)

// The values of Engine.Kind.
const (
	KindCommand = "command" // any program
	KindDockerd = "dockerd" // slipway gives the options that dockerd needs here
)

// CheckName reports why name cannot be an engine's name: it is a directory's name, a
// word of the command line and part of a log line.
func CheckName(name string) error {
	if name == "" || len(name) > maxName {
		return fmt.Errorf("engine name %q: must have 1 to %d characters", name, maxName)
	}
	for i, r := range name {
		alnum := r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9'
		if !alnum && (i == 0 || !strings.ContainsRune("_.-", r)) {
			return fmt.Errorf("engine name %q: may have letters, digits, and after the first character also _ . -", name)
		}
	}
	return nil
}
