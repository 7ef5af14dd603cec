package nsagent

import (
	"errors"
	"fmt"
	"syscall"
)

// Error says what was tried on what and why it did not work.
type Error struct {
	Op   string // what we tried: "open", "mount"
	On   string // on what: "/dev/net/tun"
	Err  error  // why; a syscall.Errno where the kernel said no
	Hint string // what a user can do about it, or empty
}

// Error returns one line, WHAT on WHICH: WHY.
func (e *Error) Error() string { return fmt.Sprintf("%s on %s: %v", e.Op, e.On, e.Err) }

// Unwrap returns Err.
func (e *Error) Unwrap() error { return e.Err }

// ExecError reports that a command could not be started.
type ExecError struct {
	Code int    // as POSIX shells say it: 127 not found, 126 found but not executable
	Name string // the program as it was asked for
	Err  error
}

// Error returns one line.
func (e *ExecError) Error() string { return fmt.Sprintf("exec on %s: %v", e.Name, e.Err) }

// Unwrap returns Err.
func (e *ExecError) Unwrap() error { return e.Err }

// Exit codes of ExecError (POSIX.1-2024, Shell Command Language, 2.8.2).
const (
	CodeNotExecutable = 126
	CodeNotFound      = 127
)

// ErrClosed is returned by the methods of an Agent, and by Process.Wait, when the
// agent has ended and with it everything it had started.
var ErrClosed = errors.New("the agent has ended")

// ErrHasDefaultRoute is wrapped by Start when a namespace to join has a default route
// that would compete with ours.
var ErrHasDefaultRoute = errors.New("it has a default route already")

// wireError carries an error over the socketpair. What errors.Is can ask for travels
// as a number.
type wireError struct {
	Op    string        `json:"op,omitempty"`
	On    string        `json:"on,omitempty"`
	Text  string        `json:"text"`
	Errno syscall.Errno `json:"errno,omitempty"`
	Route bool          `json:"route,omitempty"` // ErrHasDefaultRoute
	Hint  string        `json:"hint,omitempty"`
	Code  int           `json:"code,omitempty"` // an ExecError if not zero
}

// wireErrorOf prepares err, which is not nil, for the wire.
func wireErrorOf(err error) *wireError {
	w := &wireError{Text: err.Error()}
	var e *Error
	var x *ExecError
	switch {
	case errors.As(err, &x):
		w.On, w.Code, w.Text = x.Name, x.Code, x.Err.Error()
	case errors.As(err, &e):
		w.Op, w.On, w.Hint, w.Text = e.Op, e.On, e.Hint, e.Err.Error()
	}
	errors.As(err, &w.Errno)
	w.Route = errors.Is(err, ErrHasDefaultRoute)
	return w
}

// err is the inverse of wireErrorOf.
func (w *wireError) err() error {
	cause := errors.New(w.Text)
	switch {
	case w.Route:
		cause = ErrHasDefaultRoute
	case w.Errno != 0 && w.Errno.Error() == w.Text:
		cause = w.Errno
	case w.Errno != 0:
		cause = &textError{w.Text, w.Errno}
	}
	switch {
	case w.Code != 0:
		return &ExecError{Code: w.Code, Name: w.On, Err: cause}
	case w.Op != "":
		return &Error{Op: w.Op, On: w.On, Err: cause, Hint: w.Hint}
	}
	return cause
}

// textError is an errno with more words.
type textError struct {
	text  string
	errno syscall.Errno
}

func (e *textError) Error() string { return e.text }
func (e *textError) Unwrap() error { return e.errno }
