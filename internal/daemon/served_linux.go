package daemon

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/slipway-net/slipway/internal/nsagent"
)

// attachError is err, of starting the agent, with what else is known about attach. A default
// route is said in other words when it is a slipway's own: taking it away is no way out then.
func (e *engine) attachError(err error) error {
	if errors.Is(err, fs.ErrNotExist) && e.opts.Mode == ModeAttach && e.opts.NetNS != "" && hintOf(withHint(err)) == "" {
		return &Problem{Err: err, Hint: "name a file such as /run/netns/NAME; ip netns lists those there"}
	}
	if !errors.Is(err, nsagent.ErrHasDefaultRoute) {
		return err
	}
	on, netns := e.opts.NetNS, e.opts.NetNS
	if e.opts.PID != 0 {
		on, netns = fmt.Sprintf("process %d", e.opts.PID), fmt.Sprintf("/proc/%d/ns/net", e.opts.PID)
	}
	switch name := engineIn(e.state.root, netns); {
	case name != "":
		return &Problem{Err: fmt.Errorf("attach on %s: engine %s serves it already", on, name), Hint: "slipway status " + name}
	case e.opts.PID != 0 && hasDevice(e.opts.PID, nsagent.DefaultTUN):
		return &Problem{
			Err:  fmt.Errorf("attach on %s: an engine of slipway serves it already: it has the device %s", on, nsagent.DefaultTUN),
			Hint: "end that one first; slipway ls of its user lists it",
		}
	}
	return err
}

// engineIn is the running engine below root whose guest has that network namespace.
func engineIn(root, netns string) string {
	want, err := os.Stat(netns)
	if err != nil {
		return ""
	}
	names, _ := enginesIn(root) // none is an answer, too
	for _, name := range names {
		if got, err := os.Stat(filepath.Join(root, name, "netns")); err == nil && os.SameFile(got, want) {
			return name
		}
	}
	return ""
}

// hasDevice reports whether the network of a process has a device of that name.
func hasDevice(pid int, name string) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/dev", pid))
	if err != nil {
		return false
	}
	for line := range bytes.Lines(b) {
		if device, _, ok := bytes.Cut(line, []byte(":")); ok && string(bytes.TrimSpace(device)) == name {
			return true
		}
	}
	return false
}
