package config

import (
	"fmt"
	"strconv"
	"strings"
)

// Ports is a range of port numbers, First <= Last, both in it.
type Ports struct{ First, Last uint16 }

// String returns "80" or "8000-8010".
func (p Ports) String() string {
	if p.First == p.Last {
		return strconv.Itoa(int(p.First))
	}
	return fmt.Sprintf("%d-%d", p.First, p.Last)
}

// HostAccess is the set of ports of the host's loopback that a guest may reach. The
// zero HostAccess is the empty set.
type HostAccess struct {
	All   bool    // every port; Ports is empty then
	Ports []Ports // in the order given
}

// Allows reports whether port is in the set.
func (h HostAccess) Allows(port uint16) bool {
	if h.All {
		return true
	}
	for _, p := range h.Ports {
		if p.First <= port && port <= p.Last {
			return true
		}
	}
	return false
}

// String returns "none", "all", or the ports separated by commas, as ParseHostAccess
// takes it.
func (h HostAccess) String() string {
	if h.All {
		return "all"
	}
	if len(h.Ports) == 0 {
		return "none"
	}
	words := make([]string, len(h.Ports))
	for i, p := range h.Ports {
		words[i] = p.String()
	}
	return strings.Join(words, ",")
}

// maxHostAccess bounds the list: it is searched for every flow to the host.
const maxHostAccess = 1024

// ParseHostAccess parses "none", "all", or a list like "80,8000-8010".
func ParseHostAccess(s string) (HostAccess, error) {
	switch s = strings.TrimSpace(s); s {
	case "none":
		return HostAccess{}, nil
	case "all":
		return HostAccess{All: true}, nil
	}
	words := strings.Split(s, ",")
	if len(words) > maxHostAccess {
		return HostAccess{}, fmt.Errorf("%d ports and ranges are more than %d", len(words), maxHostAccess)
	}
	var h HostAccess
	for _, w := range words {
		p, err := parsePorts(strings.TrimSpace(w))
		if err != nil {
			return HostAccess{}, err
		}
		h.Ports = append(h.Ports, p)
	}
	return h, nil
}

// parsePorts parses "80" or "8000-8010".
func parsePorts(s string) (Ports, error) {
	first, last, isRange := strings.Cut(s, "-")
	a, err := parsePort(first)
	if err != nil {
		return Ports{}, fmt.Errorf("%q is no port and no range of ports", s)
	}
	b := a
	if isRange {
		if b, err = parsePort(last); err != nil || b < a {
			return Ports{}, fmt.Errorf("%q is no range of ports", s)
		}
	}
	return Ports{a, b}, nil
}

// parsePort takes decimal digits only: no sign, no space, not 0.
func parsePort(s string) (uint16, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || n == 0 {
		return 0, fmt.Errorf("%q is no port", s)
	}
	return uint16(n), nil
}
