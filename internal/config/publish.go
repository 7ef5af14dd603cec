package config

import (
	"fmt"
	"maps"
	"net/netip"
	"path"
	"slices"
	"strings"

	"github.com/slipway-net/slipway/internal/flow"
)

// maxPublish bounds the ports of one list: as many as can be published at one time.
const maxPublish = 16384

// setPublish takes a list of strings in the notation of flow.ParsePorts, or a flag's
// string. What is in it already is no error, as it is none for slipway ports add.
func setPublish(to *[]flow.PortSpec, v any) error {
	var all []flow.PortSpec
	known, have, n := make(map[flow.PortSpec]bool), make(hostPorts), 0
	err := eachWord(v, func(w string) error {
		w = strings.TrimSpace(w)
		p, err := flow.ParsePortSpecs(w)
		switch {
		case w == "auto":
			return fmt.Errorf("port %q: set publish_auto = true instead", w)
		case err != nil || n > maxPublish: // one that is too much is enough
			return err
		}
		if n += p.Len(); n > maxPublish {
			return fmt.Errorf("there are more than %d ports", maxPublish)
		}
		specs := slices.DeleteFunc(p.All(), func(s flow.PortSpec) bool { return known[s] })
		for _, s := range specs {
			known[s] = true
		}
		all = append(all, specs...)
		return have.add(specs)
	})
	if err == nil {
		*to = all
	}
	return err
}

// hostPorts are addresses and ports of the host that are asked for. The unspecified address of
// a family is there as soon as any of that family is.
type hostPorts map[hostPort]claim

type hostPort struct {
	proto flow.Proto
	host  netip.AddrPort
}

// claim is how much of an address is asked for.
type claim uint8

const (
	someOf claim = 1 + iota // of an unspecified one
	allOf
)

// add says which port is asked for twice, for that can never work.
func (have hostPorts) add(specs []flow.PortSpec) error {
	for _, s := range specs {
		if s.Host.Port() == 0 {
			continue
		}
		for _, a := range familiesOf(s.Host.Addr()) {
			if !have.claim(s.Proto, a, s.Host.Port()) {
				return fmt.Errorf("port %d/%v of the host is asked for twice", s.Host.Port(), s.Proto)
			}
		}
	}
	return nil
}

// familiesOf is a, or for the zero Addr the unspecified address of each family.
func familiesOf(a netip.Addr) []netip.Addr {
	if a.IsValid() {
		return []netip.Addr{a}
	}
	return []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}
}

// claim takes a port of an address and reports whether it was free.
func (have hostPorts) claim(p flow.Proto, a netip.Addr, port uint16) bool {
	every := hostPort{p, netip.AddrPortFrom(netip.IPv4Unspecified(), port)}
	if a.Is6() {
		every.host = netip.AddrPortFrom(netip.IPv6Unspecified(), port)
	}
	one := hostPort{p, netip.AddrPortFrom(a, port)}
	if have[every] == allOf || have[one] != 0 {
		return false
	}
	have[every] = someOf
	have[one] = allOf
	return true
}

// foldSpecs writes specs in their notation, neighbours as ranges.
func foldSpecs(specs []flow.PortSpec) []string {
	out := []string{}
	for len(specs) > 0 {
		n := 1
		for n < len(specs) && follows(specs[0], specs[n], n) {
			n++
		}
		out = append(out, rangeText(specs[0], n))
		specs = specs[n:]
	}
	return out
}

// follows reports whether b is the n-th neighbour of a.
func follows(a, b flow.PortSpec, n int) bool {
	host := int(a.Host.Port())
	if host != 0 {
		host += n
	}
	guest := int(a.Guest.Port()) + n
	if host > 65535 || guest > 65535 {
		return false
	}
	a.Host = netip.AddrPortFrom(a.Host.Addr(), uint16(host))
	a.Guest = netip.AddrPortFrom(a.Guest.Addr(), uint16(guest))
	return a == b
}

// rangeText is the notation of first and its n-1 neighbours.
func rangeText(first flow.PortSpec, n int) string {
	if n == 1 {
		return first.String()
	}
	return sideText(first.Host, n) + ":" + sideText(first.Guest, n) + "/" + first.Proto.String()
}

// sideText is an address, if there is one, and n ports from that of ap on.
func sideText(ap netip.AddrPort, n int) string {
	address := ""
	if ap.Addr().IsValid() {
		address = strings.TrimSuffix(netip.AddrPortFrom(ap.Addr(), 0).String(), "0")
	}
	if ap.Port() == 0 {
		return address + "0"
	}
	return fmt.Sprintf("%s%d-%d", address, ap.Port(), int(ap.Port())+n-1)
}

// maxSocket is the longest path of a unix socket (sun_path in unix(7)), in bytes.
const maxSocket = 107

// setDockerAPI takes "unix:///PATH" or "".
func setDockerAPI(to *string, v any) error {
	s, ok := v.(string)
	file, isUnix := strings.CutPrefix(s, "unix://")
	switch {
	case ok && s == "":
		*to = ""
		return nil
	case !ok || !isUnix || !path.IsAbs(file) || strings.Contains(file, "\x00"):
		return errNotAllowed
	case len(file) > maxSocket:
		return fmt.Errorf("the path has %d bytes, a socket's has at most %d", len(file), maxSocket)
	}
	*to = path.Clean(file)
	return nil
}

// dockerURL is the notation of setDockerAPI for a path.
func dockerURL(file string) string {
	if file == "" {
		return ""
	}
	return "unix://" + file
}

// quote writes a string of TOML.
func quote(s string) string {
	var b strings.Builder
	b.WriteByte('"')
	for _, r := range s {
		switch {
		case r == '"' || r == '\\':
			b.WriteByte('\\')
			b.WriteRune(r)
		case r < ' ' || r == 0x7f:
			fmt.Fprintf(&b, "\\u%04X", r)
		default:
			b.WriteRune(r)
		}
	}
	b.WriteByte('"')
	return b.String()
}

// quoteTable writes an inline table of TOML, in the order of its keys.
func quoteTable(table map[string]string) string {
	var out []string
	for _, name := range slices.Sorted(maps.Keys(table)) {
		out = append(out, quote(name)+" = "+quote(table[name]))
	}
	return "{ " + strings.Join(out, ", ") + " }"
}

// quoteAll writes a list of strings of TOML.
func quoteAll(list []string) string {
	out := make([]string, len(list))
	for i, s := range list {
		out[i] = quote(s)
	}
	return "[" + strings.Join(out, ", ") + "]"
}
