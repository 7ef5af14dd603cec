package api

import (
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
		var d net.Dialer
		return d.DialContext(ctx, "unix", path)
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

func (c *Client) get(ctx context.Context, path string, v any) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+Host+path, nil)
	if err != nil {
		return c.errorf("ask", err)
	}
	resp, err := c.http.Do(r)
	if err != nil {
		return c.errorf("ask", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return readError(resp)
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
	e := new(Error)
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
