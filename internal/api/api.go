// Package api is the control interface of a running engine: HTTP and JSON on a unix
// socket in the engine's state directory, its server and its client.
//
// A daemon gives a Backend to NewServer and calls Serve; the command line uses a
// Client. docs/openapi.yaml describes the same to other programs.
package api

import (
	"context"
	"net/netip"
	"os"
	"time"

	"github.com/slipway-net/slipway/internal/flow"
)

// Backend is what a Server serves. Its methods are called by many goroutines.
type Backend interface {
	// Status returns the state of the engine at this moment.
	Status() Status

	// Flows returns the live flows, newest first.
	Flows() []*flow.Flow

	// Exec starts a command in the engine. stdio are its standard input, output
	// and error; they stay the caller's and may be closed after the return. The
	// error is an *Error where there is more to say than its text.
	Exec(ctx context.Context, r ExecRequest, stdio [3]*os.File) (Process, error)

	// Info says what serves the ports.
	Info() Info

	PortBackend

	// Ports returns the published ports, in the order of their IDs.
	Ports(ctx context.Context) []Port
}

// PortBackend publishes ports. An error is an *Error with the Status that fits, where
// there is one.
type PortBackend interface {
	// AddPort publishes s for owner. Without an error the port is listening when it
	// returns. An owner who has the same already gets that.
	AddPort(ctx context.Context, owner string, s flow.PortSpec) (Port, error)

	// RemovePort ends a port, whoever owns it. Its connections go on.
	RemovePort(id uint64) error
}

// Process is a command that Backend.Exec started.
type Process interface {
	PID() int
	Signal(os.Signal) error
	// Wait blocks until the command has ended and returns its exit status,
	// 128+n after signal n.
	Wait() (code int, err error)
}

// Error is a failure as the API tells it: one line, what a user can do, and the exit
// status for a command line.
type Error struct {
	Message string `json:"error"`
	Hint    string `json:"hint,omitempty"`
	Code    int    `json:"code,omitempty"` // 126, 127; 0 means 125

	// Status is that of HTTP which says the same: 400 for what cannot be asked, 404 for
	// what is not there, 409 for what somebody else has, 503 for a limit. 0 means 500.
	Status int `json:"-"`
}

// errorBody is an Error as the body of an HTTP answer. RootlessKit's clients read
// message only, so it has the hint as well.
type errorBody struct {
	*Error
	Text string `json:"message,omitempty"`
}

// Error returns the message.
func (e *Error) Error() string { return e.Message }

// ExecRequest says what to start.
type ExecRequest struct {
	Args Words `json:"args"`          // the program and its arguments
	Env  Words `json:"env"`           // NAME=value; the whole environment
	Dir  Word  `json:"dir,omitempty"` // absolute; empty for the engine's own
	TTY  bool  `json:"tty,omitempty"` // standard input is a terminal to be controlled by
}

// Status is the state of one engine.
type Status struct {
	Engine    Engine     `json:"engine"`
	Path      PathStatus `json:"path"`
	Link      LinkStatus `json:"link"`
	Addresses Addresses  `json:"addresses"`
	DNS       DNSStatus  `json:"dns"`
	Ping      PingStatus `json:"ping"`
	Policy    Policy     `json:"policy"`
	Flows     []Flows    `json:"flows"` // one for each protocol
	Memory    Memory     `json:"memory"`

	// Counters are what the parts count, by part and name: packets, dials,
	// queries, and everything that was dropped or refused at a limit.
	Counters map[string]map[string]int64 `json:"counters"`

	// Warnings are what does not work as it should, one line each.
	Warnings []string `json:"warnings"`
}

// Engine says who it is.
type Engine struct {
	Name          string    `json:"name"`
	Mode          string    `json:"mode"` // "run", "up" or "attach"
	Command       []string  `json:"command,omitempty"`
	Version       string    `json:"version"`
	PID           int       `json:"pid"`                   // the daemon
	AgentPID      int       `json:"agent_pid"`             // the first process inside, as the host counts
	CommandPID    int       `json:"command_pid,omitempty"` // none with attach
	Started       time.Time `json:"started"`
	UptimeSeconds float64   `json:"uptime_seconds"`
	StateDir      string    `json:"state_dir"`
	UserNamespace string    `json:"user_namespace"` // how IDs are mapped: "none", "ranges", "identity", "single"
	Isolate       []string  `json:"isolate"`
}

// PathStatus says how flows travel, and why so.
type PathStatus struct {
	Configured string    `json:"configured"` // "auto" or "netstack"
	TCP        flow.Path `json:"tcp"`
	UDP        flow.Path `json:"udp"`
	Ping       flow.Path `json:"ping"`
	Why        string    `json:"why"`
}

// LinkStatus describes the guest's device.
type LinkStatus struct {
	Device           string   `json:"device"`
	MTU              int      `json:"mtu"`
	OffloadsAccepted []string `json:"offloads_accepted"`
	OffloadsRefused  []string `json:"offloads_refused"`
}

// Addresses are the engine's.
type Addresses struct {
	Subnet4  netip.Prefix `json:"ipv4_subnet"`
	Subnet6  netip.Prefix `json:"ipv6_subnet"`
	Gateway4 netip.Addr   `json:"ipv4_gateway"`
	Gateway6 netip.Addr   `json:"ipv6_gateway"`
	Host4    netip.Addr   `json:"ipv4_host"`
	Host6    netip.Addr   `json:"ipv6_host"`
	Guest4   netip.Addr   `json:"ipv4_guest"`
	Guest6   netip.Addr   `json:"ipv6_guest"`
	Default4 bool         `json:"ipv4_default_route"` // the guest has a default route
	Default6 bool         `json:"ipv6_default_route"`
	Mirrored int          `json:"mirrored_routes"` // routes of the host that the guest has too

	// Shared is why guests inside may show as one address (a container engine's
	// MASQUERADE); empty when each is seen as itself.
	Shared string `json:"guests_share_one_address,omitempty"`
}

// DNSStatus says whom the gateway asks.
type DNSStatus struct {
	Servers []netip.AddrPort `json:"servers"`
	Source  string           `json:"source"` // the file they come from
}

// PingStatus says how echo requests leave the host and what the guest may do.
type PingStatus struct {
	Mode       string `json:"mode"`                       // "ping socket", "raw socket" or "unavailable"
	Why        string `json:"why,omitempty"`              // it is unavailable
	Hint       string `json:"hint,omitempty"`             // what would make it available
	GroupRange string `json:"ping_group_range,omitempty"` // inside; empty when left alone
}

// Policy is what a guest may reach on the host.
type Policy struct {
	HostAccess    string `json:"host_access"`
	HostAddresses string `json:"host_addresses"`
}

// Flows sums up the flows of one protocol. Bytes are payload, of live and ended ones.
type Flows struct {
	Proto        flow.Proto `json:"proto"`
	Live         int        `json:"live"`
	Ended        uint64     `json:"ended"`
	ToHostBytes  uint64     `json:"to_host_bytes"`
	ToGuestBytes uint64     `json:"to_guest_bytes"`
}

// Memory is the daemon's, in bytes.
type Memory struct {
	Resident   uint64 `json:"resident"` // 0 where it is not known
	Heap       uint64 `json:"heap"`
	Goroutines int    `json:"goroutines"`
}

// Flow is one entry of the flow table.
type Flow struct {
	ID       uint64         `json:"id"`
	Proto    flow.Proto     `json:"proto"`
	Guest    netip.AddrPort `json:"guest"`
	Target   netip.AddrPort `json:"target"`
	Name     string         `json:"name,omitempty"`
	Decision flow.Decision  `json:"decision"`
	Reason   string         `json:"reason,omitempty"`
	Path     flow.Path      `json:"path"`
	Dialled  netip.AddrPort `json:"dialled"`
	State    string         `json:"state"`
	Started  time.Time      `json:"started"`
	LastSeen time.Time      `json:"last_seen"`
	ToHost   Count          `json:"to_host"`
	ToGuest  Count          `json:"to_guest"`
}

// Count is one direction of a flow.
type Count struct {
	Bytes   uint64 `json:"bytes"`
	Packets uint64 `json:"packets"`
}

// flowOf copies an entry as it is at this moment.
func flowOf(f *flow.Flow) Flow {
	path, why := f.Via()
	if why == "" {
		why = f.Reason
	}
	return Flow{
		ID: f.ID, Proto: f.Tuple.Proto, Guest: f.Tuple.Guest, Target: f.Tuple.Target,
		Name: f.Name, Decision: f.Decided, Reason: why, Path: path, Dialled: f.Dialled,
		State: f.State().String(), Started: f.Started, LastSeen: f.LastSeen(),
		ToHost:  Count{f.ToHost.Bytes.Load(), f.ToHost.Packets.Load()},
		ToGuest: Count{f.ToGuest.Bytes.Load(), f.ToGuest.Packets.Load()},
	}
}

// FlowList is the answer of /v1/flows.
type FlowList struct {
	Flows []Flow `json:"flows"`
	// Total is how many there are; more than len(Flows) when a limit was given.
	Total int `json:"total"`
}
