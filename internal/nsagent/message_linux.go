package nsagent

import (
	"strings"
	"syscall"
	"time"
)

// request is what the daemon sends; exactly one field besides ID is set.
type request struct {
	ID     uint64         `json:"id,omitempty"` // of the process, for Exec and Signal; or of this request
	Setup  *setupRequest  `json:"setup,omitempty"`
	Mapped bool           `json:"mapped,omitempty"` // the user namespace has its IDs
	Exec   *execRequest   `json:"exec,omitempty"`
	Signal syscall.Signal `json:"signal,omitempty"`
	Stop   *stopRequest   `json:"stop,omitempty"`

	Sockets *socketsRequest `json:"sockets,omitempty"`
}

// socketsRequest asks for N sockets. Answered by the same ID.
type socketsRequest struct {
	Kind SocketKind `json:"kind"`
	N    int        `json:"n"`
}

// setupRequest is a Spec.
type setupRequest struct {
	Spec
	NoOwner bool `json:"no_owner,omitempty"` // see Spec.noOwner
}

// execRequest is a Command. Its files travel beside it: stdin, stdout and stderr, each
// one replaced by /dev/null where the caller had none.
type execRequest struct {
	Args []byte `json:"args"` // NUL-terminated strings: JSON would mend what is not UTF-8
	Env  []byte `json:"env"`
	Dir  string `json:"dir,omitempty"`
	TTY  bool   `json:"tty,omitempty"`
	Main bool   `json:"main,omitempty"`
}

// stopRequest ends everything, and then the agent.
type stopRequest struct {
	Grace time.Duration `json:"grace"` // from TERM to KILL; zero kills at once
}

// event is what the agent sends; exactly one field besides ID is set.
type event struct {
	ID      uint64      `json:"id,omitempty"` // of the process or the request, for Failed and what is below it
	Ready   *readyEvent `json:"ready,omitempty"`
	Log     *logEvent   `json:"log,omitempty"`
	Repairs uint64      `json:"repairs,omitempty"` // of the rules, so far
	Failed  *wireError  `json:"failed,omitempty"`  // answers Setup (ID 0), Exec or Sockets
	Started int         `json:"started,omitempty"`
	Stopped bool        `json:"stopped,omitempty"` // the main command's own process group stopped
	Exited  *exitEvent  `json:"exited,omitempty"`
	Sockets int         `json:"sockets,omitempty"` // answers Sockets: how many travel beside it
}

// readyEvent answers Setup. Beside it travel the files of these names, in their order.
type readyEvent struct {
	Report Report   `json:"report"`
	Files  []string `json:"files"`
}

// Names of the files that a guest gives out.
const (
	wireTUN       = "tun"
	wireNetNS     = "netns"
	wireNFT       = "nftables" // the owner of the tables
	wireListener4 = "listener4"
	wireListener6 = "listener6"
	wireProbe4    = "probe4"
	wireProbe6    = "probe6"
	wireRoutes    = "routes" // rtnetlink(7)
	wireDiag      = "diag"   // sock_diag(7)
)

// logEvent asks the daemon to write a line for the agent, which has no log.
type logEvent struct {
	Message string `json:"message"`
	On      string `json:"on,omitempty"`
	Error   string `json:"error,omitempty"`
}

// exitEvent reports the end of a process.
type exitEvent struct {
	Status syscall.WaitStatus `json:"status"`
}

// packStrings joins list so that unpackStrings can take it apart. No element may
// contain NUL.
func packStrings(list []string) []byte {
	n := 0
	for _, s := range list {
		n += len(s) + 1
	}
	b := make([]byte, 0, n)
	for _, s := range list {
		b = append(append(b, s...), 0)
	}
	return b
}

// unpackStrings is the inverse of packStrings.
func unpackStrings(b []byte) []string {
	if len(b) == 0 {
		return nil
	}
	return strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00")
}
