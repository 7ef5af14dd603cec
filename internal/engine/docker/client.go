package docker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
)

// Limits for what an engine says. Its containers' labels are in it, so images have a say.
const (
	maxList  = 64 << 20
	maxEvent = 4 << 20
	maxError = 4 << 10
)

// client asks an engine. Paths have no version: the engine takes its newest, and the few
// fields that we read are the same in all.
type client struct{ http http.Client }

func newClient(socket string) *client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}
	return &client{http.Client{Transport: &http.Transport{DialContext: dial}}}
}

func (c *client) close() { c.http.CloseIdleConnections() }

// statusError is an answer of an engine that is no success.
type statusError struct {
	status  int
	message string
}

func (e *statusError) Error() string { return fmt.Sprintf("status %d: %s", e.status, e.message) }

// open asks for path; the caller closes the body. The error is a *statusError if the
// engine answered.
func (c *client) open(ctx context.Context, path string) (*http.Response, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://docker"+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(r)
	if err != nil {
		return nil, why(err)
	}
	if resp.StatusCode == http.StatusOK {
		return resp, nil
	}
	defer resp.Body.Close()
	b, _ := io.ReadAll(io.LimitReader(resp.Body, maxError))
	e := &statusError{resp.StatusCode, strings.TrimSpace(string(b))}
	var said struct{ Message string }
	if json.Unmarshal(b, &said) == nil && said.Message != "" {
		e.message = said.Message
	}
	return nil, e
}

// why leaves out the URL, which is none.
func why(err error) error {
	if u := (*url.Error)(nil); errors.As(err, &u) {
		return u.Err
	}
	return err
}

// get reads the JSON at path into v and returns the answer's header.
func (c *client) get(ctx context.Context, path string, v any) (http.Header, error) {
	resp, err := c.open(ctx, path)
	if err != nil {
		return nil, fmt.Errorf("ask for %s: %w", path, err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxList+1))
	if err == nil && len(b) > maxList {
		err = fmt.Errorf("longer than %d bytes", maxList)
	}
	if err == nil {
		err = json.Unmarshal(b, v)
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return resp.Header, nil
}

// list asks for the running containers.
func (c *client) list(ctx context.Context) (list []container, err error) {
	_, err = c.get(ctx, "/containers/json", &list)
	return list, err
}

// containers lists the running containers with all of their ports.
func (c *client) containers(ctx context.Context) ([]container, error) {
	var list []container
	h, err := c.get(ctx, "/containers/json", &list)
	if err != nil || h.Get("Libpod-Api-Version") == "" {
		return list, err
	}
	// podman's list has the first port only of a range.
	for i := range list {
		if len(list[i].Ports) == 0 {
			continue
		}
		if err := c.inspect(ctx, &list[i]); err != nil {
			return nil, err
		}
	}
	return list, nil
}

// inspect replaces what a list says of a container's ports by what it says itself.
func (c *client) inspect(ctx context.Context, l *container) error {
	var i inspection
	_, err := c.get(ctx, "/containers/"+url.PathEscape(l.ID)+"/json", &i)
	if gone := (*statusError)(nil); errors.As(err, &gone) && gone.status == http.StatusNotFound {
		l.Ports = nil
		return nil
	}
	if err == nil {
		l.Ports = i.ports()
	}
	return err
}

// manages reports whether the engine manages a swarm, so that it can be asked for
// services: dockerd calls any other question about them an error in its log. One that
// does not say so may be asked.
func (c *client) manages(ctx context.Context) bool {
	var info struct {
		Swarm *struct{ ControlAvailable bool }
	}
	_, err := c.get(ctx, "/info", &info)
	return err != nil || info.Swarm == nil || info.Swarm.ControlAvailable
}

// services lists a swarm's services.
func (c *client) services(ctx context.Context) (list []service, err error) {
	_, err = c.get(ctx, "/services", &list)
	return list, err
}

// events calls opened when the engine has begun to tell them, and leaves a word in
// changed, if there is room, for each that may change what is published. It returns when
// ctx or the stream ends.
func (c *client) events(ctx context.Context, opened func(), changed chan<- struct{}) error {
	resp, err := c.open(ctx, "/events")
	if err != nil {
		return fmt.Errorf("ask for /events: %w", err)
	}
	defer resp.Body.Close()
	opened()
	body := &io.LimitedReader{R: resp.Body}
	for in := json.NewDecoder(body); ; {
		var e event
		body.N = maxEvent
		if err := in.Decode(&e); err != nil {
			return fmt.Errorf("read /events: %w", err)
		}
		if !e.matters() {
			continue
		}
		select {
		case changed <- struct{}{}:
		default: // there is one
		}
	}
}

// event is one of an engine's.
type event struct{ Type, Action string }

// actions are those that may change what is published. Others come all the time, such as
// those of health checks.
var actions = map[string][]string{
	"container": {"start", "restart", "die", "died", "stop", "kill", "oom", "pause", "unpause", "rename", "update", "destroy", "remove", "cleanup"},
	"network":   {"connect", "disconnect"},
	"service":   {"create", "update", "remove"},
	"node":      {"create", "update", "remove"},
	"daemon":    {"reload"},
}

func (e event) matters() bool { return slices.Contains(actions[e.Type], e.Action) }
