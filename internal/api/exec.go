package api

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"syscall"
)

// Theory of operation.
//
// An exec begins as an HTTP request that asks for an upgrade; when it is granted, the
// socket carries this instead:
//
//	client: one byte 0 with three file descriptors (SCM_RIGHTS): stdin, stdout, stderr
//	server: {"pid": N}, or {"failed": Error} and the end
//	client: {"signal": N}, any number of times
//	server: {"exit": N}, or {"failed": Error}, and the end
//
// one JSON document a line. The client closing the socket means that nobody waits any
// more: the command gets HUP, as from a terminal that goes away. No byte of the
// command's input or output passes through us.

// execProtocol is the name in the Upgrade header.
const execProtocol = "slipway-exec"

// execReply is what the server sends; exactly one field is set.
type execReply struct {
	PID   int    `json:"pid,omitempty"`
	Exit  *int   `json:"exit,omitempty"`
	Error *Error `json:"failed,omitempty"`
}

// execSignal is what the client sends.
type execSignal struct {
	Signal int `json:"signal"`
}

// maxSignal is the last number of a signal on Linux (SIGRTMAX).
const maxSignal = 64

func (s *Server) exec(w http.ResponseWriter, r *http.Request) {
	req, e := readExec(r)
	if e != nil {
		fail(w, http.StatusBadRequest, e)
		return
	}
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		fail(w, http.StatusInternalServerError, &Error{Message: err.Error()})
		return
	}
	defer conn.Close()
	defer context.AfterFunc(r.Context(), func() { conn.Close() })()
	if err := s.serveExec(r.Context(), conn.(*limitedConn).UnixConn, req); err != nil {
		s.log.Debug("exec ended early", slog.Any("err", err))
	}
}

// readExec checks a request.
func readExec(r *http.Request) (req ExecRequest, _ *Error) {
	if r.Header.Get("Upgrade") != execProtocol {
		return req, &Error{Message: "an exec needs the header Upgrade: " + execProtocol}
	}
	d := json.NewDecoder(r.Body)
	d.DisallowUnknownFields()
	if err := d.Decode(&req); err != nil {
		return req, &Error{Message: "read request: " + err.Error()}
	}
	if len(req.Args) == 0 || req.Args[0] == "" {
		return req, &Error{Message: "no command given"}
	}
	return req, nil
}

func (s *Server) serveExec(ctx context.Context, conn *net.UnixConn, req ExecRequest) error {
	const granted = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: " + execProtocol + "\r\n\r\n"
	if _, err := io.WriteString(conn, granted); err != nil {
		return err
	}
	stdio, err := receiveFiles(conn)
	if err != nil {
		return err
	}
	p, err := s.backend.Exec(ctx, req, stdio)
	for _, f := range stdio {
		f.Close()
	}
	out := json.NewEncoder(conn)
	if err != nil {
		return out.Encode(execReply{Error: asError(err)})
	}
	if err := out.Encode(execReply{PID: p.PID()}); err != nil {
		p.Signal(syscall.SIGHUP)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		passSignals(conn, p)
	}()
	code, err := p.Wait()
	if err != nil {
		err = out.Encode(execReply{Error: asError(err)})
	} else {
		err = out.Encode(execReply{Exit: &code})
	}
	conn.Close()
	<-done
	return err
}

// passSignals sends on what the client says until the connection ends.
func passSignals(conn io.Reader, p Process) {
	in := json.NewDecoder(conn)
	for {
		var m execSignal
		if err := in.Decode(&m); err != nil {
			if !errors.Is(err, net.ErrClosed) { // the client has gone, we have not
				p.Signal(syscall.SIGHUP)
			}
			return
		}
		if m.Signal > 0 && m.Signal <= maxSignal {
			p.Signal(syscall.Signal(m.Signal))
		}
	}
}

// Exec starts a command in the engine with the given standard input, output and error,
// which stay the caller's. Each signal from signals is passed on. It blocks until the
// command has ended and returns its exit status; the error is an *Error when the engine
// refused. When ctx ends, the command gets HUP and Exec returns ctx's error.
func (c *Client) Exec(ctx context.Context, r ExecRequest, stdio [3]*os.File, signals <-chan os.Signal) (int, error) {
	return c.ExecStarted(ctx, r, stdio, signals, func() {})
}

// ExecStarted is Exec, and calls passed when the engine has the files: the caller may
// close its own.
func (c *Client) ExecStarted(ctx context.Context, r ExecRequest, stdio [3]*os.File, signals <-chan os.Signal, passed func()) (int, error) {
	conn, in, err := c.upgrade(ctx, r)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	if err := sendFiles(conn, stdio); err != nil {
		return 0, c.errorf("exec", err)
	}
	passed()
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		out := json.NewEncoder(conn)
		for {
			select {
			case <-stop:
				return
			case sig := <-signals:
				if n, ok := sig.(syscall.Signal); ok && out.Encode(execSignal{int(n)}) != nil {
					return
				}
			}
		}
	}()
	defer func() { close(stop); <-done }()
	return c.awaitExit(ctx, in)
}

func (c *Client) awaitExit(ctx context.Context, in io.Reader) (int, error) {
	d := json.NewDecoder(in)
	for {
		var m execReply
		err := d.Decode(&m)
		switch {
		case ctx.Err() != nil:
			return 0, ctx.Err()
		case err != nil:
			return 0, c.errorf("exec", errors.New("the engine has ended"))
		case m.Error != nil:
			return 0, m.Error
		case m.Exit != nil:
			return *m.Exit, nil
		}
	}
}

// upgrade makes the request and returns the connection and what is read from it.
func (c *Client) upgrade(ctx context.Context, r ExecRequest) (*net.UnixConn, io.Reader, error) {
	body, err := json.Marshal(r)
	if err != nil {
		return nil, nil, c.errorf("exec", err)
	}
	conn, err := dialUnix(ctx, c.path)
	if err != nil {
		return nil, nil, c.errorf("exec", err)
	}
	head := fmt.Sprintf("POST /v1/exec HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n",
		Host, execProtocol, len(body))
	if _, err := conn.Write(append([]byte(head), body...)); err != nil {
		conn.Close()
		return nil, nil, c.errorf("exec", err)
	}
	in := bufio.NewReader(conn)
	resp, err := http.ReadResponse(in, nil)
	if err != nil {
		conn.Close()
		return nil, nil, c.errorf("exec", err)
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		defer conn.Close()
		return nil, nil, readError(resp)
	}
	return conn, in, nil
}
