package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/slipway-net/slipway/internal/api"
	"github.com/slipway-net/slipway/internal/config"
	"github.com/slipway-net/slipway/internal/daemon"
	"github.com/slipway-net/slipway/internal/flow"
)

// enginePort is a published port and whose it is.
type enginePort struct {
	Engine string `json:"engine"`
	api.Port
}

func newPorts() *cobra.Command {
	cmd := newPortsLs()
	cmd.Use = "ports [ENGINE]"
	cmd.Short = "List, publish and withdraw ports of the guest on this host"
	cmd.Long = "Without a further command list the published ports of an engine, or of all, as ports ls does.\n\n" +
		"A SPEC is [HOSTIP:]HOSTPORT:[GUESTIP:]GUESTPORT[/tcp|udp]. Ports may be ranges, 8000-8009:9000-9009,\n" +
		"HOSTPORT may be 0, any, and IPv6 addresses are in brackets. Without HOSTIP it is all addresses of\n" +
		"this host, without GUESTIP the engine's own."
	cmd.AddCommand(newPortsLs(), newPortsAdd(), newPortsRm())
	return cmd
}

func newPortsLs() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "ls [ENGINE]",
		Short: "List the published ports of an engine, or of all",
		Long: "List the published ports of an engine, or of all. GUEST is what clients reach, and in brackets the\n" +
			"container that the engine's rules lead them on to. OWNER is who asked: docker and the container's\n" +
			"name, where the engine's Docker API tells it, config (the configuration or -p), api (slipway ports\n" +
			"add, the API), auto (publish_auto), or guest, a process in the engine. CLIENTS counts connections and\n" +
			"UDP clients so far, REFUSED those that the guest did not want, GATEWAY those that it sees as the\n" +
			"gateway although SOURCE is preserve and they are not on this host's loopback; slipway flows says why.",
		Args:              words(0, 1, ""),
		ValidArgsFunction: completeEngine,
		RunE: func(cmd *cobra.Command, args []string) error {
			answers, err := askEach(cmd.Context(), args, askPorts)
			if err != nil {
				return err
			}
			silent := reportSilent(cmd, answers)
			ports := []enginePort{}
			for _, a := range answers {
				for _, p := range a.value {
					ports = append(ports, enginePort{a.engine, p})
				}
			}
			if asJSON {
				return errors.Join(printJSON(cmd.OutOrStdout(), map[string]any{"ports": ports}), silent)
			}
			return errors.Join(printTable(cmd.OutOrStdout(), portRows(ports)), silent)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON document")
	return cmd
}

func askPorts(ctx context.Context, c *api.Client) ([]api.Port, error) { return c.Ports(ctx) }

func portRows(ports []enginePort) [][]string {
	rows := [][]string{{"ENGINE", "ID", "PROTO", "LISTEN", "GUEST", "SOURCE", "OWNER", "CLIENTS", "REFUSED", "GATEWAY"}}
	for _, p := range ports {
		rows = append(rows, []string{
			p.Engine, strconv.FormatUint(p.ID, 10), printable(p.Spec.Proto), listenText(p.Port), guestText(p.Port), sourceText(p.Spec), ownerText(p.Port),
			fmt.Sprint(p.Counters.Clients), fmt.Sprint(p.Counters.Refused), fmt.Sprint(p.Counters.Gateway),
		})
	}
	return rows
}

// listenText is where a port listens: *:8080 is every address of both families.
func listenText(p api.Port) string {
	words := make([]string, len(p.Listens))
	wildcards := 0
	for i, l := range p.Listens {
		words[i] = l.String()
		if l.Addr().IsUnspecified() && l.Port() == p.Listens[0].Port() {
			wildcards++
		}
	}
	if wildcards == 2 && len(words) == 2 {
		return fmt.Sprintf("*:%d", p.Listens[0].Port())
	}
	return dash(strings.Join(words, " "))
}

// guestText is what a port's clients reach, and the container that the engine's rules
// lead them on to, where that is known.
func guestText(p api.Port) string {
	text := p.Reaches.String()
	if !p.Reaches.IsValid() { // an engine that is older than we are
		text = net.JoinHostPort(cmp.Or(p.Spec.ChildIP, "engine"), strconv.Itoa(p.Spec.ChildPort))
	}
	if b := p.Spec.Behind; b != "" && b != text {
		text += " (" + printable(b) + ")"
	}
	return text
}

// ownerText is who asked for a port.
func ownerText(p api.Port) string {
	if p.Container != "" {
		return "docker: " + printable(p.Container)
	}
	words, guest := strings.CutPrefix(p.Owner, "guest:")
	if !guest {
		return printable(p.Owner)
	}
	pid, _, _ := strings.Cut(words, "/")
	if p.Program != "" {
		pid += ", " + printable(p.Program)
	}
	return "guest (pid " + printable(pid) + ")"
}

// sourceText says which client address the guest sees, where the port says that.
func sourceText(s api.PortSpec) string {
	if s.ProxyProtocol {
		return "gateway+proxy" // whatever it says: the header has the client
	}
	return dash(printable(s.SourceIP))
}

func newPortsAdd() *cobra.Command {
	var asJSON, proxy bool
	var source string
	cmd := &cobra.Command{
		Use:   "add [ENGINE] SPEC...",
		Short: "Publish ports of the guest on this host",
		Long: "Publish ports. They listen when the command ends, and are printed with the ports that were\n" +
			"chosen for 0. Each port of a range is published by itself: when one cannot be, the others are,\n" +
			"and the exit status is 125. What was added already, or is configured, is no error; to change a\n" +
			"port, or to take one that is published otherwise, withdraw it first. ENGINE may be left out when\n" +
			"only one is running. slipway ports --help says what a SPEC is.",
		Example: "  slipway ports add web 8080:80 127.0.0.1:5353:53/udp\n  slipway ports add web 0:127.0.0.1:3000 --json",
		Args:    words(1, -1, "SPEC"), ValidArgsFunction: completeEngine,
		RunE: func(cmd *cobra.Command, args []string) error {
			engine, words, err := engineFirst(args)
			if err != nil {
				return usage(cmd, err)
			}
			if len(words) == 0 {
				return usage(cmd, errors.New("SPEC is missing"))
			}
			specs, err := parseSpecs(words)
			if err != nil {
				return usage(cmd, err)
			}
			for i := range specs {
				if specs[i].ProxyProtocol = proxy; proxy && specs[i].Proto != flow.TCP {
					return usage(cmd, fmt.Errorf("--proxy-protocol: %v: it is for TCP only", specs[i]))
				}
				if specs[i].Source, err = parseSource(source); err != nil {
					return usage(cmd, err)
				}
			}
			return withEngine(engine, func(name string, c *api.Client) error {
				ports, problems := addPorts(cmd.Context(), c, specs)
				if err := printAdded(cmd, name, ports, asJSON); err != nil {
					return err
				}
				return reportAll(cmd, problems)
			})
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON document")
	cmd.Flags().BoolVar(&proxy, "proxy-protocol", false, "begin each TCP connection with a PROXY protocol header, version 2, that names the client")
	cmd.Flags().StringVar(&source, "source-ip", "", "which client address the guest sees, `preserve|gateway`; without it what is configured")
	completeFlag(cmd, "source-ip", sourceWords...)
	return cmd
}

// sourceWords are the values of --source-ip.
var sourceWords = []string{string(flow.SourcePreserve), string(flow.SourceGateway)}

// parseSource takes the value of --source-ip; without one it is the engine's.
func parseSource(s string) (flow.Source, error) {
	if s != "" && !slices.Contains(sourceWords, s) {
		return "", fmt.Errorf("--source-ip: %q is not allowed: must be %s", s, strings.Join(sourceWords, " or "))
	}
	return flow.Source(s), nil
}

func parseSpecs(words []string) ([]flow.PortSpec, error) {
	var all []flow.PortSpec
	for _, w := range words {
		specs, err := flow.ParsePorts(w)
		if err != nil {
			return nil, err
		}
		all = append(all, specs...)
	}
	return all, nil
}

// addPorts publishes one after the other, and returns each port once. At the engine's limit
// it stops: what follows would only be refused, too.
func addPorts(ctx context.Context, c *api.Client, specs []flow.PortSpec) (ports []api.Port, problems []error) {
	have := make(map[uint64]bool)
	for i, s := range specs {
		p, err := askOne(ctx, func(ctx context.Context) (api.Port, error) { return c.AddPort(ctx, s) })
		if err == nil {
			if !have[p.ID] {
				ports, have[p.ID] = append(ports, p), true
			}
			continue
		}
		problems = append(problems, err)
		if ae := (*api.Error)(nil); !errors.As(err, &ae) || ae.Status == http.StatusServiceUnavailable {
			if rest := len(specs) - i - 1; rest > 0 {
				problems = append(problems, fmt.Errorf("publish from %v on: %d ports not tried", specs[i+1], rest))
			}
			break
		}
	}
	return ports, problems
}

// askOne asks with askTimeout.
func askOne[T any](ctx context.Context, ask func(context.Context) (T, error)) (T, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	return ask(ctx)
}

func printAdded(cmd *cobra.Command, engine string, ports []api.Port, asJSON bool) error {
	if asJSON {
		list := make([]enginePort, len(ports))
		for i, p := range ports {
			list[i] = enginePort{engine, p}
		}
		return printJSON(cmd.OutOrStdout(), map[string]any{"ports": list})
	}
	if len(ports) == 0 {
		return nil
	}
	rows := [][]string{{"ID", "PROTO", "LISTEN", "GUEST"}}
	for _, p := range ports {
		rows = append(rows, []string{strconv.FormatUint(p.ID, 10), printable(p.Spec.Proto), listenText(p), guestText(p)})
	}
	return printTable(cmd.OutOrStdout(), rows)
}

func newPortsRm() *cobra.Command {
	return &cobra.Command{
		Use:   "rm [ENGINE] ID|SPEC...",
		Short: "Withdraw published ports",
		Long: "Withdraw ports, by the ID of ports ls or as they were asked for, whoever did: a SPEC without\n" +
			"HOSTIP, or without GUESTIP, means none that was asked for with one. They take no new clients;\n" +
			"connections go on until their ends. The port of a container comes back when that is started again,\n" +
			"one of the configuration when that is read again. ENGINE may be left out when only one is running.",
		Example: "  slipway ports rm web 8080:80\n  slipway ports rm 3 4",
		Args:    words(1, -1, "ID or SPEC"), ValidArgsFunction: completePort,
		RunE: func(cmd *cobra.Command, args []string) error {
			engine, words, err := engineFirst(args)
			if err != nil {
				return usage(cmd, err)
			}
			if len(words) == 0 {
				return usage(cmd, errors.New("ID or SPEC is missing"))
			}
			targets, err := parseTargets(words)
			if err != nil {
				return usage(cmd, err)
			}
			return withEngine(engine, func(name string, c *api.Client) error {
				return reportAll(cmd, removePorts(cmd.Context(), c, name, targets))
			})
		},
	}
}

// portTarget is a port to be withdrawn: by its ID, or as it was asked for.
type portTarget struct {
	id   uint64 // 0 for none
	spec flow.PortSpec
}

func parseTargets(words []string) (targets []portTarget, err error) {
	for _, w := range words {
		if id, ok := portID(w); ok {
			targets = append(targets, portTarget{id: id})
			continue
		}
		if !strings.Contains(w, ":") {
			return nil, fmt.Errorf("port %q: must be an ID of ports ls, or a SPEC like 8080:80", w)
		}
		specs, err := flow.ParsePorts(w)
		if err != nil {
			return nil, err
		}
		for _, s := range specs {
			if s.Host.Port() == 0 {
				return nil, fmt.Errorf("port %q: 0 names no port: use the one that was chosen, or the ID", w)
			}
			targets = append(targets, portTarget{spec: s})
		}
	}
	return targets, nil
}

// portID reads the ID of a port, a number above 0.
func portID(s string) (uint64, bool) {
	id, err := strconv.ParseUint(s, 10, 64)
	return id, err == nil && id > 0
}

func removePorts(ctx context.Context, c *api.Client, engine string, targets []portTarget) (problems []error) {
	ports, err := askOne(ctx, c.Ports)
	if err != nil {
		return []error{err}
	}
	have, gone := indexPorts(ports), make(map[uint64]bool)
	var missed []portTarget
	var toHint []*daemon.Problem
	for _, t := range targets {
		id, ok := have.find(t)
		if ok && gone[id] {
			continue // it was named twice
		}
		if ok {
			_, err := askOne(ctx, func(ctx context.Context) (struct{}, error) { return struct{}{}, c.RemovePort(ctx, id) })
			ae := (*api.Error)(nil)
			late := errors.As(err, &ae) && ae.Status == http.StatusNotFound // somebody else was first
			gone[id] = err == nil || late
			if err != nil && !late {
				problems = append(problems, err)
			}
			if !late {
				continue
			}
		}
		p := &daemon.Problem{Err: fmt.Errorf("withdraw %v on %s: not published", t, engine)}
		problems, toHint, missed = append(problems, p), append(toHint, p), append(missed, t)
	}
	hint := nearHint(have.nearAll(missed, gone)) + "slipway ports ls " + engine
	for _, p := range toHint {
		p.Hint = hint
	}
	return problems
}

// maxNear is how many ports are named that may have been meant.
const maxNear = 4

// nearHint asks for the ports that may have been meant.
func nearHint(near []publishedPort) string {
	if len(near) == 0 {
		return ""
	}
	var words []string
	for _, p := range near[:min(maxNear, len(near))] {
		words = append(words, p.String())
	}
	if more := len(near) - maxNear; more > 0 {
		words = append(words, fmt.Sprintf("%d more", more))
	}
	return "did you mean " + strings.Join(words, " or ") + "? All are listed by "
}

// String is the target as it was named.
func (t portTarget) String() string {
	if t.id != 0 {
		return "port " + strconv.FormatUint(t.id, 10)
	}
	return t.spec.String()
}

// portIndex finds published ports: there may be thousands.
type portIndex struct {
	ids    map[uint64]bool
	byHost map[hostPort]publishedPort
	byPort map[uint16][]publishedPort // of the host
}

// hostPort is what no two published ports have in common.
type hostPort struct {
	proto flow.Proto
	host  netip.AddrPort
}

// publishedPort is a port as it was asked for, and what its clients reach.
type publishedPort struct {
	id      uint64
	spec    flow.PortSpec
	reaches netip.AddrPort
}

func indexPorts(ports []api.Port) portIndex {
	x := portIndex{make(map[uint64]bool, len(ports)), make(map[hostPort]publishedPort, len(ports)), make(map[uint16][]publishedPort, len(ports))}
	for _, p := range ports {
		x.ids[p.ID] = true
		if s, err := p.Spec.Flow(); err == nil {
			s.Guest = netip.AddrPortFrom(s.Guest.Addr(), cmp.Or(s.Guest.Port(), s.Host.Port()))
			one := publishedPort{p.ID, s, p.Reaches}
			x.byHost[hostPort{s.Proto, s.Host}] = one
			x.byPort[s.Host.Port()] = append(x.byPort[s.Host.Port()], one)
		}
	}
	return x
}

// find returns the ID of the published port that is meant.
func (x portIndex) find(t portTarget) (uint64, bool) {
	if t.id != 0 {
		return t.id, x.ids[t.id]
	}
	p, ok := x.byHost[hostPort{t.spec.Proto, t.spec.Host}]
	return p.id, ok && p.leadsTo(t.spec.Guest)
}

// near are the ports that whoever named t may have meant, for t is none: those of the same
// port of the host, which is easily taken for an ID, too.
func (x portIndex) near(t portTarget) []publishedPort {
	port := uint64(t.spec.Host.Port())
	if t.id != 0 {
		port = t.id
	}
	if port > 65535 {
		return nil
	}
	return x.byPort[uint16(port)]
}

// nearAll is near for all of targets, each port once, without those that are gone.
func (x portIndex) nearAll(targets []portTarget, gone map[uint64]bool) (all []publishedPort) {
	named := make(map[uint64]bool)
	for _, t := range targets {
		for _, p := range x.near(t) {
			if !gone[p.id] && !named[p.id] {
				all, named[p.id] = append(all, p), true
			}
		}
	}
	return all
}

// leadsTo reports whether guest is where p leads, in the words of a SPEC. An address may be
// any that is listed. Without one, none may have been asked for: the container's may be left out,
// which docker says and nobody asks for.
func (p publishedPort) leadsTo(guest netip.AddrPort) bool {
	asked, behind := p.spec.Guest, p.spec.Behind
	if guest.Addr().IsValid() {
		return guest == asked || guest == p.reaches || guest == behind
	}
	return !asked.Addr().IsValid() && (guest.Port() == asked.Port() || guest.Port() == behind.Port())
}

// String is a SPEC that means p, and its ID.
func (p publishedPort) String() string {
	s := p.spec
	if s.Behind.IsValid() && !s.Guest.Addr().IsValid() {
		s.Guest = netip.AddrPortFrom(netip.Addr{}, s.Behind.Port())
	}
	return fmt.Sprintf("%v (ID %d)", s, p.id)
}

// engineFirst takes the engine's name off the words of a command line. It is "" when
// there is none: a SPEC is no name, for it has a colon, and neither is a number or a range of
// them, unless an engine is called so and more follows.
func engineFirst(args []string) (name string, rest []string, err error) {
	first := args[0]
	if strings.ContainsAny(first, ":/") {
		return "", args, nil
	}
	if numbers(first) {
		running, err := daemon.Engines()
		if err != nil || len(args) == 1 || !slices.Contains(running, first) {
			return "", args, err
		}
	}
	return first, args[1:], config.CheckName(first)
}

// numbers reports whether s is a number, or a range of them.
func numbers(s string) bool {
	first, last, found := strings.Cut(s, "-")
	return digits(first) && (!found || digits(last))
}

func digits(s string) bool { return s != "" && strings.Trim(s, "0123456789") == "" }

// withEngine calls f with a client of the engine called name, or for "" of the only one
// that is running.
func withEngine(name string, f func(name string, c *api.Client) error) error {
	if name == "" {
		var err error
		if name, err = onlyEngine(); err != nil {
			return err
		}
	}
	c, err := daemon.ClientOf(name)
	if err != nil {
		return err
	}
	defer c.Close()
	return f(name, c)
}

// onlyEngine is the engine that is meant when none is named.
func onlyEngine() (string, error) {
	names, err := daemon.Engines()
	switch {
	case err != nil:
		return "", err
	case len(names) == 0:
		return "", &daemon.Problem{Err: errors.New("choose engine: none is running"), Hint: "slipway run or slipway up starts one"}
	case len(names) > 1:
		return "", &daemon.Problem{Err: errors.New("choose engine: which one is not said"), Hint: "running: " + strings.Join(names, ", ")}
	}
	return names[0], nil
}

// reportAll writes every problem, and each hint once.
func reportAll(cmd *cobra.Command, problems []error) error {
	if len(problems) < 2 {
		return errors.Join(problems...)
	}
	var hints []string
	for _, err := range problems {
		fmt.Fprintf(cmd.ErrOrStderr(), "slipway: %v\n", err)
		if hint, _ := advice(err); hint != "" && !slices.Contains(hints, hint) {
			hints = append(hints, hint)
		}
	}
	for _, hint := range hints {
		fmt.Fprintf(cmd.ErrOrStderr(), "hint: %s\n", hint)
	}
	return statusError(daemon.CodeFailed)
}
