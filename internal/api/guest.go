package api

import (
	"errors"

	"github.com/slipway-net/slipway/internal/flow"
)

// GuestBackend is what a GuestServer serves. Its methods are called by many goroutines.
type GuestBackend interface {
	PortBackend

	// NetNS is the path of the engine's network namespace, like /proc/PID/ns/net.
	NetNS() string
}

// GuestConn is a lease on published ports, from inside an engine: they are withdrawn
// when it ends. Its methods may be called by several goroutines.
type GuestConn struct{}

// DialGuest connects to the guest.sock at path.
func DialGuest(path string) (*GuestConn, error) { return nil, errors.New("not built yet") }

// Publish asks for a port, which is listening when there is no error. The error is an
// *Error where the engine refused, and another one when the connection has ended.
func (c *GuestConn) Publish(s flow.PortSpec) (Port, error) { return Port{}, errors.ErrUnsupported }

// Withdraw ends one of the connection's own ports.
func (c *GuestConn) Withdraw(id uint64) error { return errors.ErrUnsupported }

// Done is closed when the connection has ended, and the ports with it.
func (c *GuestConn) Done() <-chan struct{} { return nil }

// Close withdraws the ports and returns when that is done.
func (c *GuestConn) Close() error { return nil }
