package daemon

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"github.com/slipway-net/slipway/forward/publish"
	"github.com/slipway-net/slipway/internal/api"
)

// The book knows other holders of a port as processes, and its own owners by the words
// of the API. Here they become what a user knows: engines, and ways to ask for a port.

// told is err, from the book, in words for a user.
func (e *engine) told(err error) error {
	var c *publish.ConflictError
	if !errors.As(err, &c) {
		return err
	}
	if spec, owner, ok := publishedHolder(c.Holder); ok {
		hint := hintOf(err)
		if owner == ownerConfig {
			hint = "publish another host port (0: any), or take it out of the configuration or of -p"
		}
		return conflict(c, spec+" of "+ownerText(owner), hint)
	}
	how, name, pid, ok := processHolder(c.Holder)
	if !ok {
		return err
	}
	const another = "publish another host port (0: any)"
	switch engine := engineOf(e.state.root, pid); {
	case engine == e.opts.Name:
		return conflict(c, fmt.Sprintf("%sthis engine (pid %d)", how, pid), another)
	case engine != "":
		return conflict(c, fmt.Sprintf("%sengine %s (pid %d)", how, engine, pid), another+"; slipway ports ls "+engine+" shows who has it")
	case name == "slipway":
		return conflict(c, fmt.Sprintf("%sa slipway engine (pid %d)", how, pid), another)
	}
	return err
}

// conflict is c with another holder and another hint.
func conflict(c *publish.ConflictError, holder, hint string) error {
	return &Problem{Err: &publish.ConflictError{Spec: c.Spec, Holder: holder}, Hint: hint}
}

// publishedHolder takes apart the holder "the published port SPEC of OWNER".
func publishedHolder(holder string) (port, owner string, ok bool) {
	if !strings.HasPrefix(holder, "the published port ") {
		return "", "", false
	}
	return cutLast(holder, " of ")
}

func cutLast(s, sep string) (before, after string, found bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+len(sep):], true
}

var reProcessHolder = regexp.MustCompile(`^(a connection of )?(.*) \(pid ([0-9]+)\)$`)

// processHolder takes apart the holder "[a connection of ]NAME (pid N)".
func processHolder(holder string) (how, name string, pid int, ok bool) {
	m := reProcessHolder.FindStringSubmatch(holder)
	if m == nil {
		return "", "", 0, false
	}
	pid, err := strconv.Atoi(m[3])
	return m[1], m[2], pid, err == nil
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

// ownerText is an owner of published ports as a user knows it.
func ownerText(owner string) string {
	switch owner {
	case ownerConfig:
		return "the configuration or -p"
	case api.OwnerAPI:
		return "slipway ports add or the API"
	case ownerAuto:
		return "publish_auto"
	case ownerDocker:
		return "a container, by docker_api"
	}
	words, _, _ := strings.Cut(strings.TrimPrefix(owner, "guest:"), "/")
	comm, err := os.ReadFile(filepath.Join("/proc", words, "comm"))
	if _, bad := strconv.Atoi(words); bad != nil || err != nil {
		return "a process in the engine"
	}
	name := strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, strings.TrimSpace(string(comm)))
	return fmt.Sprintf("%s (pid %s) in the engine", cmp.Or(name, "a process"), words)
}
