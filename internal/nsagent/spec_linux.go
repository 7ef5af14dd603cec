package nsagent

import (
	"net/netip"
	"os"
	"time"
)

// DefaultTUN is the usual name of the guest's network device.
const DefaultTUN = "slipway0"

// DefaultStopTimeout is the usual time between TERM and KILL. dockerd gives its
// containers 15 s (its --shutdown-timeout) and needs a little for itself.
const DefaultStopTimeout = 20 * time.Second

// Spec says what a guest's namespaces look like. It is fixed at Start.
type Spec struct {
	// Rootless makes a user namespace of the guest's own in which the caller
	// is root. It is needed for an ordinary user and allowed for root.
	Rootless bool
	// PrivateMounts cuts mount propagation both ways. Without it the guest
	// sees the host's mounts come and go, and the host never sees the guest's.
	PrivateMounts bool
	// PIDNamespace gives the guest process numbers and a /proc of its own.
	PIDNamespace bool
	// Join, if not nil, serves a namespace that somebody else made. Nothing is
	// created then: Rootless, PrivateMounts, PIDNamespace, ResolvConf and
	// Hosts are ignored, since the mounts are somebody else's too. Commands run
	// in the network namespace and its user namespace, and otherwise in the
	// daemon's.
	Join *Join

	// TUN is the guest's network device. An empty name means DefaultTUN.
	TUN TUN
	// Addresses are the guest's own, each with the prefix of its subnet.
	Addresses []netip.Prefix
	// Gateway4 and Gateway6 are slipway's addresses on the device. An invalid
	// one leaves its family without routes.
	Gateway4, Gateway6 netip.Addr
	// Default4 and Default6 ask for a default route by the gateway; without
	// one the rest of the world is unreachable at once.
	Default4, Default6 bool
	// Mirror are further destinations with a route by the gateway.
	Mirror []netip.Prefix

	// ResolvConf and Hosts are files of ours on the host which appear as
	// /etc/resolv.conf and /etc/hosts in the guest. Rewriting them in place
	// shows at once; they should be readable by everybody (mode 0644), as
	// others than root run in the guest. Empty leaves the host's file.
	ResolvConf, Hosts string

	// IdentitySNAT keeps the guest's MASQUERADE rules from hiding containers.
	IdentitySNAT bool
	// KernelPath asks for what the kernel path needs: rules, routes and sockets.
	KernelPath bool
	// PingRange opens ping sockets to every group of the guest.
	PingRange bool
	// NonlocalBind lets the guest's programs listen on addresses that it does not
	// have, as dockerd's proxies do for a port of one address of the host.
	NonlocalBind bool

	// StopTimeout is how long commands may take to end after TERM before they
	// are killed. Zero means DefaultStopTimeout, negative kills at once.
	StopTimeout time.Duration

	// Held, if there is one, stays open in the agent: a lock on it tells until when
	// there may be something of the guest, also after a kill -9 of the caller, whose it
	// stays.
	Held *os.File `json:"-"`

	// noOwner has the agent do as on kernels whose tables have no owners, for tests.
	noOwner bool
}

// TUN names the guest's network device.
type TUN struct {
	Name string // at most 15 bytes
	MTU  int    // bytes of IP packet; 1280 to 65535, zero means 1500
}

// Join names a network namespace by exactly one of its fields.
type Join struct {
	PID   int    // a process in it; the namespace is gone when this process is
	NetNS string // a file such as /run/netns/NAME; gone when PATH is another file
}

// Mapping tells how user and group IDs of the guest relate to those of the host.
type Mapping string

// The kinds of mappings.
const (
	MappingNone     Mapping = "none"     // no user namespace: they are the same
	MappingRanges   Mapping = "ranges"   // 0 is the caller, the others come from /etc/subuid and /etc/subgid
	MappingIdentity Mapping = "identity" // every ID is itself; for root without ranges
	MappingSingle   Mapping = "single"   // 0 is the caller and there is no other
)

// Report is what Start found out. An empty reason means that all is well; none of
// them keeps the guest from running.
type Report struct {
	Mapping Mapping `json:"mapping"`
	// MappingNote is why there is only a single ID, if something is missing.
	MappingNote string `json:"mapping_note,omitempty"`
	// PingRange is the guest's net.ipv4.ping_group_range, or empty if it was
	// left alone; PingNote is why.
	PingRange string `json:"ping_range,omitempty"`
	PingNote  string `json:"ping_note,omitempty"`
	// SNAT is why the identity SNAT could not be loaded: a guest's containers
	// may then share one address.
	SNAT string `json:"snat,omitempty"`
	// Kernel is why the kernel path is not available, with what was missing; empty
	// if it is, or was not asked for.
	Kernel string `json:"kernel,omitempty"`
	// Kernel6 is why it has no IPv6, so that IPv6 flows take netstack; empty if it
	// has, and if there is no kernel path at all.
	Kernel6 string `json:"kernel6,omitempty"`
	// UDPTimeout is the least time, in seconds, that the guest's conntrack remembers
	// a UDP mapping after its last datagram.
	UDPTimeout int `json:"udp_timeout,omitempty"`
	// LocalPorts are the first and the last port that the guest's kernel gives to
	// sockets which ask for none.
	LocalPorts [2]uint16 `json:"local_ports"`
	// NonlocalBind is why the guest's programs cannot listen on addresses that it
	// does not have; empty if they can, or it was not asked for.
	NonlocalBind string `json:"nonlocal_bind,omitempty"`
	// Sys is why /sys shows the host's network devices.
	Sys string `json:"sys,omitempty"`
	// IPv6 is why the guest has no IPv6.
	IPv6 string `json:"ipv6,omitempty"`
	// Names is why /etc/resolv.conf or /etc/hosts is not ours (yet).
	Names []string `json:"names,omitempty"`
	// Routes are the mirrored routes that the kernel refused, each with why.
	Routes []string `json:"routes,omitempty"`
}

// Command is a program to start in the guest.
type Command struct {
	// Args are the program and its arguments. A program without a slash is
	// looked up in the PATH of Env, in the guest. Bytes other than NUL may
	// appear; all together with Env at most 2 MiB, the kernel's usual limit.
	Args []string
	Env  []string // NAME=value
	// Dir is the working directory, an absolute path in the guest. Empty means
	// the one the agent was started in.
	Dir string
	// Stdin, Stdout and Stderr are handed to the program; nil means
	// /dev/null. They stay the caller's and may be closed after Exec. They are
	// handed over as they are: few programs expect a non-blocking pipe, which
	// is what os.Pipe makes and File.Fd unmakes.
	Stdin, Stdout, Stderr *os.File
	// TTY makes Stdin, a terminal that is nobody's yet, the controlling
	// terminal of the program.
	TTY bool
	// Main keeps the program in the daemon's own session and process group, so
	// that the terminal treats both as one job: Ctrl-C and Ctrl-Z reach it
	// without our help, a shell may take the terminal and hand it back. So the
	// daemon must not end by SIGINT; it has to catch it (signal.Notify), as a
	// command inherits what is ignored. SIGTSTP is best left alone. Every other
	// command gets a session of its own.
	Main bool
}

// Status is how a process ended.
type Status struct {
	Code   int       // the exit status; 128 + n after signal n, as shells say it
	Signal os.Signal // the signal that ended it, or nil
}
