package config

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/slipway-net/slipway/internal/flow"
)

// key is one setting: its name in the file, the range that an error and the
// documentation quote, and its two directions. set takes what the file has (string,
// int64, bool, []any) or a flag's string.
type key struct {
	name    string
	allowed string
	parse   func(s *Settings, v any) error
	get     func(s *Settings) string // in TOML

	// explained is set where an error of one element says itself what is allowed there.
	explained bool
}

// set stores v, or says that it is not in the allowed range: of a list everything that is not,
// for each to take apart.
func (k key) set(s *Settings, v any) error {
	var all []error
	for _, err := range each(k.parse(s, v)) {
		all = append(all, inElement(err, func(err error) error {
			if errors.Is(err, errNotAllowed) {
				return fmt.Errorf("%s: %s is not allowed: must be %s", k.name, show(elementOf(v, err)), k.allowed)
			}
			if in := (*elementError)(nil); k.explained && errors.As(err, &in) {
				return fmt.Errorf("%s: %w", k.name, err)
			}
			return fmt.Errorf("%s: %w: must be %s", k.name, err, k.allowed)
		}))
	}
	return errors.Join(all...)
}

// each returns the errors that errors.Join has made err of; err itself if it is no such, and
// none for nil.
func each(err error) []error {
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		return joined.Unwrap()
	}
	if err == nil {
		return nil
	}
	return []error{err}
}

// elementError is what is wrong with one element of a list.
type elementError struct {
	n   int // from 0
	err error
}

func (e *elementError) Error() string { return e.err.Error() }
func (e *elementError) Unwrap() error { return e.err }

// inElement says err in other words, about the same element if it is about one.
func inElement(err error, say func(error) error) error {
	if in := (*elementError)(nil); errors.As(err, &in) {
		return &elementError{in.n, say(err)}
	}
	return say(err)
}

// elementOf is what err is about: an element of the list v, or all of v.
func elementOf(v any, err error) any {
	if in := (*elementError)(nil); errors.As(err, &in) {
		if list, ok := v.([]any); ok && in.n < len(list) {
			return list[in.n]
		}
	}
	return v
}

// errNotAllowed stands for "not in the range that the key names".
var errNotAllowed = errors.New("not allowed")

// keys are all settings in the order of `slipway config show`.
var keys = []key{
	{
		name: "path", allowed: `"auto", "kernel" or "netstack"`,
		parse: func(s *Settings, v any) error {
			return oneOf(&s.Path, v, PathAuto, PathKernel, PathNetstack)
		},
		get: func(s *Settings) string { return quote(s.Path) },
	}, {
		name: "host_access", allowed: `"none", "all", or a list of ports and ranges like [80, "8000-8010"]`,
		parse: func(s *Settings, v any) error { return setPortSet(&s.HostAccess, v) },
		get:   func(s *Settings) string { return s.HostAccess.toml() },
	}, {
		name: "host_addresses", allowed: `"allow" or "as-host-access"`,
		parse: func(s *Settings, v any) error { return oneOf(&s.HostAddresses, v, "allow", "as-host-access") },
		get:   func(s *Settings) string { return quote(s.HostAddresses) },
	}, {
		name: "ipv4_subnet", allowed: "an IPv4 prefix of unicast addresses with a length of 8 to 29",
		parse: func(s *Settings, v any) error { return setSubnet(&s.IPv4Subnet, v, true) },
		get:   func(s *Settings) string { return quote(s.IPv4Subnet.String()) },
	}, {
		name: "ipv6_subnet", allowed: "an IPv6 prefix of unicast addresses with a length of 8 to 125",
		parse: func(s *Settings, v any) error { return setSubnet(&s.IPv6Subnet, v, false) },
		get:   func(s *Settings) string { return quote(s.IPv6Subnet.String()) },
	}, {
		// Below 1280 there is no IPv6 (RFC 8200 section 5).
		name: "mtu", allowed: "a number in 1280..65535",
		parse: func(s *Settings, v any) error { return number(&s.MTU, v, 1280, 65535) },
		get:   func(s *Settings) string { return strconv.Itoa(s.MTU) },
	}, {
		name: "isolate", allowed: `a list of "net" (always on), "mount" and "pid"`,
		parse: setIsolate,
		get:   getIsolate,
	}, {
		name: "stop_timeout", allowed: `a duration like "20s" in 0s..1h`,
		parse: func(s *Settings, v any) error { return duration(&s.StopTimeout, v, time.Hour) },
		get:   func(s *Settings) string { return quote(s.StopTimeout.String()) },
	}, {
		name: "log_level", allowed: `"debug", "info", "warn" or "error"`,
		parse: setLevel,
		get:   func(s *Settings) string { return quote(strings.ToLower(s.LogLevel.String())) },
	}, {
		name: "limits.dials", allowed: "a number in 1..65536",
		parse: func(s *Settings, v any) error { return number(&s.MaxDials, v, 1, 65536) },
		get:   func(s *Settings) string { return strconv.Itoa(s.MaxDials) },
	}, {
		name: "limits.udp_mappings", allowed: "a number in 1..1048576",
		parse: func(s *Settings, v any) error { return number(&s.MaxUDP, v, 1, 1<<20) },
		get:   func(s *Settings) string { return strconv.Itoa(s.MaxUDP) },
	}, {
		name: "publish", allowed: `a list like ["8080:80", "127.0.0.1:5353:53/udp", "8000-8009:9000-9009"]`,
		parse: func(s *Settings, v any) error { return setPublish(&s.Publish, v) },
		get:   func(s *Settings) string { return quoteAll(foldSpecs(s.Publish)) }, explained: true,
	}, {
		name: "publish_bind", allowed: `"as-asked", "loopback-default" or "loopback-only"`,
		parse: func(s *Settings, v any) error {
			return oneOf(&s.PublishBind, v, BindAsAsked, BindLoopbackDefault, BindLoopbackOnly)
		},
		get: func(s *Settings) string { return quote(s.PublishBind) },
	}, {
		name: "publish_ports", allowed: `"all", "none", or a list of ports and ranges like [80, "8000-8999"]`,
		parse: func(s *Settings, v any) error { return setPortSet(&s.PublishPorts, v) },
		get:   func(s *Settings) string { return s.PublishPorts.toml() },
	}, {
		name: "source_ip", allowed: `"preserve" or "gateway"`,
		parse: func(s *Settings, v any) error {
			return oneOf((*string)(&s.SourceIP), v, string(flow.SourcePreserve), string(flow.SourceGateway))
		},
		get: func(s *Settings) string { return quote(string(s.SourceIP)) },
	}, {
		name: "publish_auto", allowed: "true or false",
		parse: func(s *Settings, v any) error { return truth(&s.PublishAuto, v) },
		get:   func(s *Settings) string { return strconv.FormatBool(s.PublishAuto) },
	}, {
		name: "docker_api", allowed: `"unix:///PATH" of a socket, or "" for none`,
		parse: func(s *Settings, v any) error { return setDockerAPI(&s.DockerAPI, v) },
		get:   func(s *Settings) string { return quote(dockerURL(s.DockerAPI)) },
	},
}

func lookup(name string) (key, bool) {
	i := slices.IndexFunc(keys, func(k key) bool { return k.name == name })
	if i < 0 {
		return key{}, false
	}
	return keys[i], true
}

// show writes a value for an error message, short.
func show(v any) string {
	const longest = 60
	s := fmt.Sprint(v)
	if str, ok := v.(string); ok {
		s = strconv.Quote(str)
	}
	if len(s) > longest {
		s = strings.ToValidUTF8(s[:longest], "") + "..."
	}
	return s
}

func oneOf(to *string, v any, allowed ...string) error {
	s, ok := v.(string)
	if !ok || !slices.Contains(allowed, s) {
		return errNotAllowed
	}
	*to = s
	return nil
}

func number(to *int, v any, low, high int64) error {
	n, ok := v.(int64)
	if s, isString := v.(string); isString { // a flag's
		var err error
		n, err = strconv.ParseInt(s, 10, 64)
		ok = err == nil
	}
	if !ok || n < low || n > high {
		return errNotAllowed
	}
	*to = int(n)
	return nil
}

// truth takes a boolean, or a flag's string.
func truth(to *bool, v any) error {
	b, ok := v.(bool)
	if s, isString := v.(string); isString && (s == "true" || s == "false") {
		b, ok = s == "true", true
	}
	if !ok {
		return errNotAllowed
	}
	*to = b
	return nil
}

func duration(to *time.Duration, v any, high time.Duration) error {
	s, _ := v.(string)
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 || d > high {
		return errNotAllowed
	}
	*to = d
	return nil
}

func setLevel(s *Settings, v any) error {
	var name string
	if err := oneOf(&name, v, "debug", "info", "warn", "error"); err != nil {
		return err
	}
	var l slog.Level
	if err := l.UnmarshalText([]byte(name)); err != nil {
		return err
	}
	s.LogLevel = l
	return nil
}

// eachWord has take look at each string or number of a list, or of a flag's string with
// commas. It returns what is wrong with any of them, joined.
func eachWord(v any, take func(word string) error) error {
	list, ok := v.([]any)
	if s, isString := v.(string); isString {
		for w := range strings.SplitSeq(s, ",") {
			list = append(list, w)
		}
	} else if !ok {
		return errNotAllowed
	}
	var all []error
	for i, e := range list {
		err := errNotAllowed
		switch e := e.(type) {
		case string:
			err = take(e)
		case int64:
			err = take(strconv.FormatInt(e, 10))
		}
		if err != nil {
			all = append(all, &elementError{i, err})
		}
	}
	return errors.Join(all...)
}

func setIsolate(s *Settings, v any) error {
	var mount, pid bool
	err := eachWord(v, func(w string) error {
		switch strings.TrimSpace(w) {
		case "net":
		case "mount":
			mount = true
		case "pid":
			pid = true
		default:
			return errNotAllowed
		}
		return nil
	})
	if err == nil {
		s.IsolateMount, s.IsolatePID = mount, pid
	}
	return err
}

func getIsolate(s *Settings) string {
	out := `["net"`
	if s.IsolateMount {
		out += `, "mount"`
	}
	if s.IsolatePID {
		out += `, "pid"`
	}
	return out + "]"
}

// toml is String as the file has it.
func (s PortSet) toml() string {
	if s.All || len(s.Ports) == 0 {
		return quote(s.String())
	}
	out := make([]string, len(s.Ports))
	for i, p := range s.Ports {
		if out[i] = p.String(); p.First != p.Last {
			out[i] = quote(out[i])
		}
	}
	return "[" + strings.Join(out, ", ") + "]"
}

// setSubnet takes a prefix that has room for the gateway, the host and the guest.
func setSubnet(to *netip.Prefix, v any, want4 bool) error {
	s, _ := v.(string)
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return errNotAllowed
	}
	a := p.Addr()
	longest := 125
	if want4 {
		longest = 29
	}
	unusable := a.IsUnspecified() || a.IsLoopback() || a.IsMulticast() || a.IsLinkLocalUnicast() || a.Is4In6() ||
		a.Is4() && a.As4()[0] >= 240 || a.Is4() && a.As4()[0] == 0
	if a.Is4() != want4 || unusable || p.Bits() < 8 || p.Bits() > longest {
		return errNotAllowed
	}
	if p != p.Masked() {
		return fmt.Errorf("%v has bits behind its length, %v is meant", p, p.Masked())
	}
	*to = p
	return nil
}
