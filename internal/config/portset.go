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

// PortSet is a set of port numbers. The zero PortSet is the empty set.
type PortSet struct {
	All   bool    // every port; Ports is empty then
	Ports []Ports // in the order given
}

// HostAccess is the ports of the host's loopback that a guest may reach.
type HostAccess = PortSet

// Allows reports whether port is in the set.
func (s PortSet) Allows(port uint16) bool {
	if s.All {
		return true
	}
	for _, p := range s.Ports {
		if p.First <= port && port <= p.Last {
			return true
		}
	}
	return false
}

// String returns "none", "all", or the ports separated by commas, as setPortSet takes
// it.
func (s PortSet) String() string {
	if s.All {
		return "all"
	}
	if len(s.Ports) == 0 {
		return "none"
	}
	words := make([]string, len(s.Ports))
	for i, p := range s.Ports {
		words[i] = p.String()
	}
	return strings.Join(words, ",")
}

// maxPortSet bounds the list: host_access is searched for every flow to the host.
const maxPortSet = 1024

// setPortSet takes "none", "all", a list of numbers and strings like 80 and "8000-8010", or a
// flag's string like "80,8000-8010".
func setPortSet(to *PortSet, v any) error {
	word, _ := v.(string)
	if list, ok := v.([]any); ok && len(list) == 1 {
		word, _ = list[0].(string)
	}
	switch strings.TrimSpace(word) {
	case "none":
		*to = PortSet{}
		return nil
	case "all":
		*to = PortSet{All: true}
		return nil
	}
	var set PortSet
	err := eachWord(v, func(w string) error {
		for s := range strings.SplitSeq(w, ",") {
			p, err := parsePorts(strings.TrimSpace(s))
			if err != nil {
				return err
			}
			set.Ports = append(set.Ports, p)
		}
		return nil
	})
	if n := len(set.Ports); err == nil && n > maxPortSet {
		err = fmt.Errorf("%d ports and ranges are more than %d", n, maxPortSet)
	}
	if err == nil {
		*to = set
	}
	return err
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
