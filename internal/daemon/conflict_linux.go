package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/slipway-net/slipway/forward/publish"
)

// The book knows other holders of a port as processes, and its own owners by the words
// of the API. Here they become what a user knows: engines, and ways to ask for a port.

// told is err, which the book has told an owner, in words for a user. A lease on guest.sock does not
// wait for a container's name: the other may be over, and the port be had at once.
func (e *engine) told(ctx context.Context, owner string, err error) error {
	var c *publish.ConflictError
	if !errors.As(err, &c) {
		return err
	}
	switch h := c.Holder.(type) {
	case publish.Published:
		hint := hintOf(err)
		if !strings.HasPrefix(owner, guestOwner) {
			if name := e.containers(ctx)(h.Owner, h.Spec); name != "" {
				return conflict(c, fmt.Sprintf("container %s of engine %s", name, e.opts.Name), hint)
			}
		}
		if h.Owner == ownerConfig {
			hint = "publish another host port (0: any), or withdraw that one first: slipway ports rm"
		}
		return conflict(c, h.By(fmt.Sprintf("%v of %s", h.Spec, ownerText(h.Owner))), hint)
	case publish.Process:
		const another = "publish another host port (0: any)"
		who, hint := "", another
		switch engine := engineOf(e.state.root, h.PID); {
		case engine == e.opts.Name:
			who = "this engine"
		case engine != "":
			if name := e.neighbours.container(ctx, e.state.root, engine, c.Spec); name != "" {
				return conflict(c, fmt.Sprintf("container %s of engine %s", name, engine), another+", or stop that container")
			}
			who, hint = "engine "+engine, another+"; slipway ports ls "+engine+" shows who has it"
		case h.Name == "slipway":
			who = "a slipway engine"
		default:
			return err
		}
		h.Name = who
		return conflict(c, h.String(), hint)
	}
	return err
}

// holder is a publish.Holder in words for a user.
type holder string

func (h holder) String() string { return string(h) }

// conflict is c with another holder and another hint.
func conflict(c *publish.ConflictError, who, hint string) error {
	return &Problem{Err: &publish.ConflictError{Spec: c.Spec, Holder: holder(who)}, Hint: hint}
}

// engineOf is the engine below root whose daemon has that pid, "" for none.
func engineOf(root string, pid int) string {
	entries, err := os.ReadDir(root)
	if err != nil {
		return ""
	}
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(root, e.Name(), "pid"))
		if err == nil && strings.TrimSpace(string(b)) == strconv.Itoa(pid) && locked(filepath.Join(root, e.Name(), "lock")) {
			return e.Name()
		}
	}
	return ""
}
