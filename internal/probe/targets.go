package probe

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Targets say whom Run talks to. The zero Targets are what an engine has without
// anybody's help. A zero field is not tried, and Missing may say why it is zero.
type Targets struct {
	TCP4, TCP6 netip.AddrPort // TCP echo services outside
	UDP4, UDP6 netip.AddrPort // UDP echo services outside

	Ping4, Ping6 netip.Addr // answer echo requests

	// HostTCP and HostUDP are the ports of echo services on the host's
	// loopback. They have to be open to the guest (host_access). With both
	// zero Run finds out whether any port is open.
	HostTCP, HostUDP uint16

	Names []string // to be resolved besides the built-in ones

	Missing map[string]string // kind (as in Set) to the reason why there is none
}

// kind is a word of Set with a single value.
type kind struct {
	name string
	set  func(t *Targets, value string) error
	get  func(t *Targets) string // empty if there is none
}

// kinds are in the order of Args.
var kinds = []kind{
	serviceKind("tcp4", ipv4, func(t *Targets) *netip.AddrPort { return &t.TCP4 }),
	serviceKind("tcp6", ipv6, func(t *Targets) *netip.AddrPort { return &t.TCP6 }),
	serviceKind("udp4", ipv4, func(t *Targets) *netip.AddrPort { return &t.UDP4 }),
	serviceKind("udp6", ipv6, func(t *Targets) *netip.AddrPort { return &t.UDP6 }),
	addrKind("ping4", ipv4, func(t *Targets) *netip.Addr { return &t.Ping4 }),
	addrKind("ping6", ipv6, func(t *Targets) *netip.Addr { return &t.Ping6 }),
	portKind("host-tcp", func(t *Targets) *uint16 { return &t.HostTCP }),
	portKind("host-udp", func(t *Targets) *uint16 { return &t.HostUDP }),
}

// Families by their names in errors.
const ipv4, ipv6 = "IPv4", "IPv6"

func isFamily(a netip.Addr, name string) bool { return a.IsValid() && a.Is4() == (name == ipv4) }

func serviceKind(name, family string, field func(*Targets) *netip.AddrPort) kind {
	return kind{name, func(t *Targets, value string) error {
		a, err := netip.ParseAddrPort(value)
		if err != nil || !isFamily(a.Addr(), family) || a.Port() == 0 {
			return fmt.Errorf("want an %s address and a port", family)
		}
		*field(t) = a
		return nil
	}, func(t *Targets) string {
		if a := *field(t); a.IsValid() {
			return a.String()
		}
		return ""
	}}
}

func addrKind(name, family string, field func(*Targets) *netip.Addr) kind {
	return kind{name, func(t *Targets, value string) error {
		a, err := netip.ParseAddr(value)
		if err != nil || !isFamily(a, family) {
			return fmt.Errorf("want an %s address", family)
		}
		*field(t) = a
		return nil
	}, func(t *Targets) string {
		if a := *field(t); a.IsValid() {
			return a.String()
		}
		return ""
	}}
}

func portKind(name string, field func(*Targets) *uint16) kind {
	return kind{name, func(t *Targets, value string) error {
		n, err := strconv.ParseUint(value, 10, 16)
		if err != nil || n == 0 {
			return errors.New("want a port, 1 to 65535")
		}
		*field(t) = uint16(n)
		return nil
	}, func(t *Targets) string {
		if n := *field(t); n != 0 {
			return strconv.Itoa(int(n))
		}
		return ""
	}}
}

// none in front of a reason says that there is no such target.
const none = "none:"

// Set takes one target in the form KIND=VALUE: tcp4, tcp6, udp4, udp6 with
// ADDRESS:PORT, ping4, ping6 with ADDRESS, host-tcp, host-udp with PORT, name with a
// name to resolve (may be repeated), path with a word for the output. VALUE may be
// "none:REASON". With String and Type, *Targets is a repeatable command line flag.
func (t *Targets) Set(s string) error {
	kind, value, ok := strings.Cut(s, "=")
	if !ok || value == "" {
		return fmt.Errorf("target %q: want KIND=VALUE", s)
	}
	if kind == "name" {
		t.Names = append(t.Names, value)
		return nil
	}
	for _, k := range kinds {
		if k.name != kind {
			continue
		}
		if reason, ok := strings.CutPrefix(value, none); ok {
			t.lack(kind, reason)
			return nil
		}
		if err := k.set(t, value); err != nil {
			return fmt.Errorf("target %q: %w", s, err)
		}
		return nil
	}
	return fmt.Errorf("target %q: kind is none of tcp4, tcp6, udp4, udp6, ping4, ping6, host-tcp, host-udp, name, path", s)
}

// Args are the words that, given to Set one by one, make the same Targets.
func (t *Targets) Args() []string {
	var args []string
	for _, k := range kinds {
		if v := k.get(t); v != "" {
			args = append(args, k.name+"="+v)
		} else if reason := t.Missing[k.name]; reason != "" {
			args = append(args, k.name+"="+none+reason)
		}
	}
	for _, n := range t.Names {
		args = append(args, "name="+n)
	}
	return args
}

// String is Args in one line, for people.
func (t *Targets) String() string { return strings.Join(t.Args(), " ") }

// Type is what a help text shows for the value of the flag.
func (t *Targets) Type() string { return "KIND=VALUE" }

// lack notes why there is no target of a kind.
func (t *Targets) lack(kind, reason string) {
	if t.Missing == nil {
		t.Missing = make(map[string]string)
	}
	t.Missing[kind] = reason
}

// missing is why there is no target of a kind.
func (t *Targets) missing(kind string) string {
	if reason := t.Missing[kind]; reason != "" {
		return reason
	}
	return fmt.Sprintf("no target given (--target %s=...)", kind)
}

// allNames are the built-in names and those asked for.
func (t *Targets) allNames() []string {
	names := []string{gatewayName, hostName}
	for _, n := range t.Names {
		if !slices.Contains(names, n) {
			names = append(names, n)
		}
	}
	return names
}
