// Package dockerproxy is the program that dockerd starts for every published port when
// --userland-proxy-path names it: it keeps the contract of dockerd's own docker-proxy,
// and publishes the port on the host.
//
// IsProxy tells whether this process is meant to be one; Main is its whole life.
package dockerproxy

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"path/filepath"

	"github.com/slipway-net/slipway/internal/flow"
)

// Name is the file name under which our binary is a docker-proxy.
const Name = "slipway-docker-proxy"

// EnvSocket is the environment variable with the path of the engine's guest.sock. Without
// it ports are not published: the program is docker-proxy then, and nothing else.
const EnvSocket = "SLIPWAY_SOCK"

// IsProxy reports whether argv0, a process's first argument, is that of a proxy.
func IsProxy(argv0 string) bool { return filepath.Base(argv0) == Name }

// options is a command line. The names of the flags are dockerd's: its host is the
// engine's namespace.
type options struct {
	proto     flow.Proto
	host      netip.AddrPort // where the engine listens
	container netip.AddrPort // where what arrives is sent
	inherited bool           // -use-listen-fd: dockerd has bound the socket already
	version   bool           // print the version and nothing else
}

// maxPort is the highest port number, and noPort that of a flag that was not given.
const (
	maxPort = 65535
	noPort  = -1
)

// given is a command line as it was written.
type given struct {
	proto                   string
	hostIP, containerIP     netip.Addr
	hostPort, containerPort int
	inherited, version      bool
}

func (w *given) flags() *flag.FlagSet {
	f := flag.NewFlagSet(Name, flag.ContinueOnError)
	f.StringVar(&w.proto, "proto", "tcp", "protocol, `tcp|udp`")
	f.TextVar(&w.hostIP, "host-ip", netip.IPv4Unspecified(), "`address` to listen on in the engine's namespace, and on the host")
	f.IntVar(&w.hostPort, "host-port", noPort, "`port` to listen on")
	f.TextVar(&w.containerIP, "container-ip", netip.Addr{}, "`address` of the container")
	f.IntVar(&w.containerPort, "container-port", noPort, "`port` of the container")
	f.BoolVar(&w.inherited, "use-listen-fd", false, "descriptor 4 is the socket to listen on")
	f.BoolVar(&w.version, "v", false, "print the version and exit")
	f.BoolVar(&w.version, "version", false, "print the version and exit")
	return f
}

// VisitFlags calls f for each flag, for a manual.
func VisitFlags(f func(*flag.Flag)) { new(given).flags().VisitAll(f) }

// parse reads a command line without the program's name. Help goes to usage.
func parse(args []string, usage io.Writer) (o options, err error) {
	var w given
	f := w.flags()
	f.SetOutput(usage)
	if err := f.Parse(args); err != nil {
		return o, err
	}
	if o.inherited, o.version = w.inherited, w.version; o.version {
		return o, nil
	}
	if f.NArg() > 0 {
		return o, fmt.Errorf("%q is too much", f.Arg(0))
	}
	if o.proto, err = parseProto(w.proto); err != nil {
		return o, err
	}
	if o.host, err = endpoint("host", w.hostIP, w.hostPort); err != nil {
		return o, err
	}
	o.container, err = endpoint("container", w.containerIP, w.containerPort)
	if err == nil && o.container.Addr().IsUnspecified() {
		err = errors.New("-container-ip is missing")
	}
	return o, err
}

func parseProto(s string) (flow.Proto, error) {
	switch s {
	case "tcp":
		return flow.TCP, nil
	case "udp":
		return flow.UDP, nil
	case "sctp":
		return 0, errors.New("sctp cannot be published: slipway carries tcp and udp")
	}
	return 0, fmt.Errorf("protocol %q cannot be published: slipway carries tcp and udp", s)
}

func endpoint(side string, a netip.Addr, port int) (netip.AddrPort, error) {
	if !a.IsValid() {
		return netip.AddrPort{}, fmt.Errorf("-%s-ip is missing", side)
	}
	if port == noPort {
		return netip.AddrPort{}, fmt.Errorf("-%s-port is missing", side)
	}
	if port < 1 || port > maxPort {
		return netip.AddrPort{}, fmt.Errorf("-%s-port %d: must be in 1..%d", side, port, maxPort)
	}
	return netip.AddrPortFrom(a.Unmap(), uint16(port)), nil
}

// spec is what the host is asked for. All addresses inside become all addresses of that
// family outside. Clients of them arrive at the engine's own address, where dockerd's
// rules lead them on; for one address those do not match, and the container is what is
// known.
func (o options) spec() flow.PortSpec {
	return flow.PortSpec{
		Proto:  o.proto,
		Host:   o.host,
		Guest:  netip.AddrPortFrom(netip.Addr{}, o.host.Port()),
		Behind: o.container,
	}
}

// String says for messages what is asked for.
func (o options) String() string { return fmt.Sprintf("%v/%v", o.host, o.proto) }
