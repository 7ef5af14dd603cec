package api

import (
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"github.com/slipway-net/slipway/internal/flow"
)

// The names of JSON fields here, and the paths in server.go, are those of RootlessKit's
// API, version 1.1.2, so that its clients can publish ports: "parent" is the host,
// "child" the guest. What RootlessKit has not is added under names of our own.

// infoVersion is the version of RootlessKit's API that we answer as.
const infoVersion = "1.1.2"

// portProtos are the words for a protocol in a request. The last letter says which
// address family to listen on where ParentIP does not.
var portProtos = []string{"tcp", "tcp4", "tcp6", "udp", "udp4", "udp6"}

// PortSpec is a flow.PortSpec in JSON, which see for what the fields mean.
type PortSpec struct {
	Proto         string `json:"proto"`
	ParentIP      string `json:"parentIP,omitempty"`   // empty: all addresses
	ParentPort    int    `json:"parentPort,omitempty"` // 0: any
	ChildIP       string `json:"childIP,omitempty"`    // empty: the engine's own
	ChildPort     int    `json:"childPort,omitempty"`  // 0: as ParentPort
	Behind        string `json:"behind,omitempty"`     // address and port of the container, where known
	SourceIP      string `json:"sourceIP,omitempty"`   // "preserve", "gateway"; empty: as configured
	ProxyProtocol bool   `json:"proxyProtocol,omitempty"`
}

// Port is a published port.
type Port struct {
	ID       uint64           `json:"id"`
	Spec     PortSpec         `json:"spec"`    // as asked, with the port and the source that were chosen
	Owner    string           `json:"owner"`   // who asked for it
	Since    time.Time        `json:"since"`   // it listens
	Listens  []netip.AddrPort `json:"listens"` // the sockets' own addresses
	Counters PortCounters     `json:"counters"`

	// What clients reach: the container, where that is known and no rules of the engine lead to it.
	Reaches netip.AddrPort `json:"reaches"`

	// In a listing only:
	Container string `json:"container,omitempty"` // the one it was published for, as the engine calls it
	Program   string `json:"program,omitempty"`   // what the process of an Owner guest:PID/N is called
}

// PortCounters count what happened at a published port.
type PortCounters struct {
	Clients uint64 `json:"clients"` // connections, or UDP clients
	Refused uint64 `json:"refused"` // the guest did not want them
	Gateway uint64 `json:"gateway"` // came from the gateway although their address was to be kept
	Dropped uint64 `json:"dropped"` // datagrams
	Errors  uint64 `json:"errors"`  // of accepting, or reading datagrams
}

// Info says what serves the ports.
type Info struct {
	APIVersion    string      `json:"apiVersion"` // RootlessKit's
	Version       string      `json:"version"`    // of slipway
	StateDir      string      `json:"stateDir"`
	ChildPID      int         `json:"childPID"` // the first process inside, as the host counts
	NetworkDriver NetworkInfo `json:"networkDriver"`
	PortDriver    PortInfo    `json:"portDriver"`
}

// NetworkInfo describes the guest's network.
type NetworkInfo struct {
	Driver  string       `json:"driver"`
	DNS     []netip.Addr `json:"dns"`
	ChildIP netip.Addr   `json:"childIP"` // the engine's own IPv4 address
	IPv6    bool         `json:"ipv6"`
}

// PortInfo says what can be published.
type PortInfo struct {
	Driver string   `json:"driver"`
	Protos []string `json:"protos"`
}

// NewInfo makes an Info with what is the same for every engine.
func NewInfo() Info {
	return Info{
		APIVersion:    infoVersion,
		NetworkDriver: NetworkInfo{Driver: "slipway", DNS: []netip.Addr{}},
		PortDriver:    PortInfo{Driver: "slipway", Protos: portProtos},
	}
}

// SpecOf writes s for JSON; the inverse of PortSpec.Flow.
func SpecOf(s flow.PortSpec) PortSpec {
	out := PortSpec{
		Proto:      s.Proto.String(),
		ParentPort: int(s.Host.Port()), ChildPort: int(s.Guest.Port()),
		SourceIP: string(s.Source), ProxyProtocol: s.ProxyProtocol,
	}
	if a := s.Host.Addr(); a.IsValid() {
		out.ParentIP = a.String()
	}
	if a := s.Guest.Addr(); a.IsValid() {
		out.ChildIP = a.String()
	}
	if s.Behind.IsValid() {
		out.Behind = s.Behind.String()
	}
	return out
}

// Flow checks s and returns what it means. The error is an *Error with a status of 400.
func (s PortSpec) Flow() (f flow.PortSpec, err error) {
	f.ProxyProtocol = s.ProxyProtocol
	if f.Proto, err = s.proto(); err != nil {
		return f, err
	}
	if f.Host, err = s.host(); err != nil {
		return f, err
	}
	if f.Guest, err = s.guest(); err != nil {
		return f, err
	}
	if f.Behind, err = s.behind(); err != nil {
		return f, err
	}
	switch f.Source = flow.Source(s.SourceIP); f.Source {
	case "", flow.SourcePreserve, flow.SourceGateway:
	default:
		return f, invalid("sourceIP %s: must be %s or %s", quote(s.SourceIP), flow.SourcePreserve, flow.SourceGateway)
	}
	if s.ProxyProtocol && f.Proto != flow.TCP {
		return f, invalid("proxyProtocol: is for tcp only")
	}
	return f, nil
}

func (s PortSpec) proto() (flow.Proto, error) {
	switch s.Proto {
	case "tcp", "tcp4", "tcp6":
		return flow.TCP, nil
	case "udp", "udp4", "udp6":
		return flow.UDP, nil
	}
	return 0, invalid("proto %s: must be one of %s", quote(s.Proto), strings.Join(portProtos, ", "))
}

// host brings the protocol's family and the address together.
func (s PortSpec) host() (netip.AddrPort, error) {
	a, err := parseIP("parentIP", s.ParentIP)
	if err != nil {
		return netip.AddrPort{}, err
	}
	switch family := s.Proto[3:]; {
	case family == "4" && s.ParentIP == "":
		a = netip.IPv4Unspecified()
	case family == "6" && s.ParentIP == "":
		a = netip.IPv6Unspecified()
	case family == "4" && !a.Is4(), family == "6" && !a.Is6():
		return netip.AddrPort{}, invalid("parentIP %s: is not of the family of proto %s", a, s.Proto)
	}
	if s.ParentPort < 0 || s.ParentPort > maxPort {
		return netip.AddrPort{}, invalid("parentPort %d: must be in 0..%d", s.ParentPort, maxPort)
	}
	return netip.AddrPortFrom(a, uint16(s.ParentPort)), nil
}

func (s PortSpec) guest() (netip.AddrPort, error) {
	a, err := parseIP("childIP", s.ChildIP)
	if err != nil {
		return netip.AddrPort{}, err
	}
	if a.IsUnspecified() || a.IsMulticast() {
		return netip.AddrPort{}, invalid("childIP %s: is no address of a guest", a)
	}
	if s.ChildPort < 0 || s.ChildPort > maxPort || s.ChildPort == 0 && s.ParentPort == 0 {
		return netip.AddrPort{}, invalid("childPort %d: must be in 1..%d", s.ChildPort, maxPort)
	}
	return netip.AddrPortFrom(a, uint16(s.ChildPort)), nil
}

func (s PortSpec) behind() (netip.AddrPort, error) {
	if s.Behind == "" {
		return netip.AddrPort{}, nil
	}
	ap, err := netip.ParseAddrPort(s.Behind)
	a := ap.Addr().Unmap()
	if err != nil || a.Zone() != "" || a.IsUnspecified() || a.IsMulticast() || ap.Port() == 0 {
		return netip.AddrPort{}, invalid("behind %s: must be an address and a port like 172.17.0.2:80 or [fd00::2]:80", quote(s.Behind))
	}
	return netip.AddrPortFrom(a, ap.Port()), nil
}

// maxPort is the highest port number.
const maxPort = 65535

// parseIP returns the zero Addr for an empty word.
func parseIP(field, s string) (netip.Addr, error) {
	if s == "" {
		return netip.Addr{}, nil
	}
	a, err := netip.ParseAddr(s)
	if err != nil || a.Zone() != "" {
		return netip.Addr{}, invalid("%s %s: is not an IP address", field, quote(s))
	}
	return a.Unmap(), nil
}

// invalid is the Error for a request that says something impossible.
func invalid(format string, args ...any) *Error {
	return &Error{Message: fmt.Sprintf(format, args...), Status: http.StatusBadRequest}
}
