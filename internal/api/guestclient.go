package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/slipway-net/slipway/internal/flow"
)

// guestAnswer is how long a GuestConn waits for one: longer than the daemon takes for a
// port, also when its guests ask for thousands.
const guestAnswer = 30 * time.Second

// GuestConn is a lease on published ports, from inside an engine: they are withdrawn
// when it ends. Its methods may be called by several goroutines.
type GuestConn struct {
	path    string
	conn    *net.UnixConn
	asking  sync.Mutex      // one question at a time
	answers chan guestReply // read by whoever asks
	done    chan struct{}
}

// DialGuest connects to the guest.sock at path.
func DialGuest(path string) (*GuestConn, error) {
	conn, err := dialUnix(context.Background(), path)
	if err != nil {
		return nil, fmt.Errorf("connect guest.sock: %w", err)
	}
	c := &GuestConn{path: path, conn: conn, answers: make(chan guestReply, 1), done: make(chan struct{})}
	go c.read()
	return c, nil
}

// Publish asks for a port, which is listening when there is no error. The error is an
// *Error where the engine refused, and another one when the connection has ended.
func (c *GuestConn) Publish(s flow.PortSpec) (Port, error) {
	spec, err := json.Marshal(SpecOf(s))
	if err != nil {
		return Port{}, c.errorf(err)
	}
	r, err := c.ask(guestRequest{Publish: spec})
	if err != nil {
		return Port{}, err
	}
	if r.Port == nil {
		return Port{}, c.errorf(errAnswer)
	}
	return *r.Port, nil
}

// Withdraw ends one of the connection's own ports.
func (c *GuestConn) Withdraw(id uint64) error {
	r, err := c.ask(guestRequest{Withdraw: id})
	if err == nil && r.Withdrawn != id {
		return c.errorf(errAnswer)
	}
	return err
}

// Done is closed when the connection has ended, and its ports with it.
func (c *GuestConn) Done() <-chan struct{} { return c.done }

// Close ends the connection and returns when the ports are withdrawn.
func (c *GuestConn) Close() error {
	err := c.conn.CloseWrite()
	select {
	case <-c.done: // the daemon closes after that
		err = nil
	case <-time.After(guestAnswer):
		c.conn.Close()
		<-c.done
	}
	return err
}

// errAnswer says that the daemon does not speak as we do.
var errAnswer = errors.New("the daemon answers something else")

// read passes answers on until the connection ends. The only one that may come before a
// question is why we are refused: it waits for whoever asks.
func (c *GuestConn) read() {
	defer close(c.done)
	defer c.conn.Close()
	in := json.NewDecoder(c.conn)
	for {
		var r guestReply
		if in.Decode(&r) != nil {
			return
		}
		select {
		case c.answers <- r:
		default:
			return // nobody asked
		}
	}
}

// ask sends a request and returns its answer.
func (c *GuestConn) ask(r guestRequest) (guestReply, error) {
	c.asking.Lock()
	defer c.asking.Unlock()
	limit := time.NewTimer(guestAnswer)
	defer limit.Stop()
	c.conn.SetWriteDeadline(time.Now().Add(guestAnswer))
	// Where it cannot be written there may still be an answer, which says why.
	writeErr := json.NewEncoder(c.conn).Encode(r)
	select {
	case a := <-c.answers:
		return judge(a)
	case <-c.done:
	case <-limit.C:
		c.conn.Close() // or the next would get our answer
		return guestReply{}, c.errorf(errors.New("no answer"))
	}
	select {
	case a := <-c.answers:
		return judge(a)
	default:
		return guestReply{}, c.errorf(errors.Join(errors.New("the daemon has ended the connection"), writeErr))
	}
}

// judge makes an error of an answer that is one.
func judge(a guestReply) (guestReply, error) {
	if a.Error != nil {
		a.Error.Status = a.Status
		return a, a.Error
	}
	return a, nil
}

func (c *GuestConn) errorf(err error) error { return fmt.Errorf("ask %s: %w", c.path, err) }
