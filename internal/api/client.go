package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"syscall"
	"time"

	"github.com/slipway-net/slipway/internal/flow"
)

// Client asks one engine. Its methods may be called by several goroutines.
type Client struct {
	path   string // of the socket
	engine string // its name, for messages
	http   http.Client
}

// NewClient returns a Client for the socket at path; engine is the name that messages
// use. It connects when asked something.
func NewClient(engine, path string) *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return dialUnix(ctx, path)
	}
	return &Client{path: path, engine: engine, http: http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}}
}

// Close ends idle connections. The Client may be used again.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Status returns the engine's status.
func (c *Client) Status(ctx context.Context) (s Status, err error) {
	return s, c.get(ctx, "/v1/status", &s)
}

// Flows returns the newest live flows; limit 0 means all.
func (c *Client) Flows(ctx context.Context, limit int) (l FlowList, err error) {
	path := "/v1/flows"
	if limit > 0 {
		path += "?limit=" + strconv.Itoa(limit)
	}
	return l, c.get(ctx, path, &l)
}

// Info returns what serves the engine's ports.
func (c *Client) Info(ctx context.Context) (i Info, err error) {
	return i, c.get(ctx, "/v1/info", &i)
}

// Ports returns the published ports, in the order of their IDs.
func (c *Client) Ports(ctx context.Context) (l []Port, err error) {
	return l, c.get(ctx, "/v1/ports", &l)
}

// AddPort publishes a port. Without an error it is listening. It is an *Error when the
// engine refused.
func (c *Client) AddPort(ctx context.Context, s flow.PortSpec) (p Port, err error) {
	return p, c.do(ctx, http.MethodPost, "/v1/ports", SpecOf(s), &p)
}

// RemovePort ends a published port. Its connections go on.
func (c *Client) RemovePort(ctx context.Context, id uint64) error {
	return c.do(ctx, http.MethodDelete, "/v1/ports/"+strconv.FormatUint(id, 10), nil, nil)
}

func (c *Client) get(ctx context.Context, path string, v any) error {
	return c.do(ctx, http.MethodGet, path, nil, v)
}

// do asks with body and reads the answer into v; nil for either means that there is none.
func (c *Client) do(ctx context.Context, method, path string, body, v any) error {
	var in io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return c.errorf("ask", err)
		}
		in = bytes.NewReader(b)
	}
	r, err := http.NewRequestWithContext(ctx, method, "http://"+Host+path, in)
	if err != nil {
		return c.errorf("ask", err)
	}
	resp, err := c.http.Do(r)
	if err != nil {
		return c.errorf("ask", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode/100 != 2 {
		return readError(resp)
	}
	if v == nil {
		return nil
	}
	if err := json.NewDecoder(resp.Body).Decode(v); err != nil {
		return c.errorf("ask", err)
	}
	return nil
}

// readError returns the Error that a response carries.
func readError(resp *http.Response) error {
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	e := &Error{Status: resp.StatusCode}
	if err != nil || json.Unmarshal(b, e) != nil || e.Message == "" {
		e.Message = "the engine answered " + resp.Status
	}
	return e
}

// ErrNotRunning says that no daemon serves the socket.
var ErrNotRunning = errors.New("not running")

// errorf says which engine, and "not running" when there is nobody.
func (c *Client) errorf(what string, err error) error {
	if ue := (*url.Error)(nil); errors.As(err, &ue) {
		err = ue.Err
	}
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		err = ErrNotRunning
	}
	return fmt.Errorf("%s engine %s: %w", what, c.engine, err)
}

// queueFull is how long a client tries to connect where too many others do, and
// queueWait how long it waits at most until it tries again: thousands who try at every
// moment would take the server's time.
const (
	queueFull = 30 * time.Second
	queueWait = 200 * time.Millisecond
)

// dialUnix connects to the socket at path. connect(2) fails with EAGAIN while the
// server's queue is full, which is nothing but a reason to wait.
func dialUnix(ctx context.Context, path string) (*net.UnixConn, error) {
	ctx, cancel := context.WithTimeout(ctx, queueFull)
	defer cancel()
	for wait := time.Millisecond; ; wait = min(2*wait, queueWait) {
		c, err := new(net.Dialer).DialContext(ctx, "unix", path)
		if err == nil {
			return c.(*net.UnixConn), nil
		}
		if !errors.Is(err, syscall.EAGAIN) {
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(wait):
		}
	}
}
