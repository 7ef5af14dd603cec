package main

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/slipway-net/slipway/internal/api"
)

// printStatus writes a status for people: what is, then what is wrong, then every
// counter that is not zero.
func printStatus(w io.Writer, s api.Status) error {
	e, a := s.Engine, s.Addresses
	rows := [][]string{
		{"engine", fmt.Sprintf("%s (%s), up %s", e.Name, e.Mode, ageText(time.Duration(e.UptimeSeconds*float64(time.Second))))},
		{"processes", processesText(e)},
		{"isolated", strings.Join(e.Isolate, ", ") + "; " + usersText(e.UserNamespace)},
		{"path", fmt.Sprintf("tcp %s, udp %s, ping %s (%s: %s)", s.Path.TCP, s.Path.UDP, s.Path.Ping, s.Path.Configured, s.Path.Why)},
		{"link", linkText(s.Link)},
		{"addresses", fmt.Sprintf("guest %v %v, gateway %v %v", a.Guest4, a.Guest6, a.Gateway4, a.Gateway6)},
		{"routes", routesText(a)},
		{"guests", guestsText(a)},
		{"dns", dnsText(s.DNS)},
		{"ping", pingText(s.Ping)},
		{"host access", fmt.Sprintf("%s; other addresses of the host: %s", s.Policy.HostAccess, s.Policy.HostAddresses)},
	}
	for _, f := range s.Flows {
		rows = append(rows, []string{"flows " + f.Proto.String(),
			fmt.Sprintf("%d live, %d ended, %s out, %s in", f.Live, f.Ended, bytesText(f.ToHostBytes), bytesText(f.ToGuestBytes))})
	}
	rows = append(rows, []string{"memory", fmt.Sprintf("%s resident, %s heap, %d goroutines",
		bytesText(s.Memory.Resident), bytesText(s.Memory.Heap), s.Memory.Goroutines)})
	for _, warning := range s.Warnings {
		rows = append(rows, []string{"warning", printable(warning)})
	}
	for _, part := range slices.Sorted(maps.Keys(s.Counters)) {
		for _, name := range slices.Sorted(maps.Keys(s.Counters[part])) {
			if n := s.Counters[part][name]; n != 0 {
				rows = append(rows, []string{part + " " + name, fmt.Sprint(n)})
			}
		}
	}
	return printTable(w, rows)
}

func processesText(e api.Engine) string {
	text := fmt.Sprintf("daemon %d, agent %d", e.PID, e.AgentPID)
	if len(e.Command) > 0 {
		text += fmt.Sprintf(", command %d: %s", e.CommandPID, printable(strings.Join(e.Command, " ")))
	}
	return text
}

// usersText says who somebody inside is on the host.
func usersText(mapping string) string {
	switch mapping {
	case "none":
		return "users and groups are the host's"
	case "ranges":
		return "root inside is you, other users and groups are those of /etc/subuid and /etc/subgid"
	case "single":
		return "root inside is you, and there is no other user"
	case "identity":
		return "users and groups are the host's, in a user namespace"
	}
	return "user namespace: " + printable(mapping)
}

func linkText(l api.LinkStatus) string {
	text := fmt.Sprintf("%s, MTU %d, offloads: %s", l.Device, l.MTU, orNone(l.OffloadsAccepted))
	if len(l.OffloadsRefused) > 0 {
		text += "; refused by the kernel: " + strings.Join(l.OffloadsRefused, " ")
	}
	return text
}

func routesText(a api.Addresses) string {
	var defaults []string
	if a.Default4 {
		defaults = append(defaults, "IPv4")
	}
	if a.Default6 {
		defaults = append(defaults, "IPv6")
	}
	return fmt.Sprintf("default: %s; %d more of the host's", orNone(defaults), a.Mirrored)
}

func guestsText(a api.Addresses) string {
	if a.Shared != "" {
		return "containers share one address: " + a.Shared
	}
	return "every container is seen by its own address"
}

func dnsText(d api.DNSStatus) string {
	servers := make([]string, len(d.Servers))
	for i, s := range d.Servers {
		servers[i] = s.String()
	}
	return orNone(servers) + " (" + d.Source + ")"
}

func pingText(p api.PingStatus) string {
	text := p.Mode
	if p.Why != "" {
		text += ": " + p.Why
	}
	if p.Hint != "" {
		text += "; hint: " + p.Hint
	}
	if p.GroupRange != "" {
		text += "; inside without root for groups " + strings.Join(strings.Fields(p.GroupRange), " to ")
	}
	return text
}

func orNone(words []string) string {
	if len(words) == 0 {
		return "none"
	}
	return strings.Join(words, " ")
}
