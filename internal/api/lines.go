package api

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"sync"
)

// Bytes of the lines on guest.sock. What docker-proxy asks for has 200. All connections
// together hold at most maxLeases * shortLine + maxLong * maxLine bytes, 3 MiB.
const (
	shortLine = 512  // every connection may be amid a line of so many
	maxLine   = 4096 // longer ones are refused
	maxLong   = 256  // connections that may be amid one longer than shortLine
)

// Why a line is refused.
var (
	errLineLong = invalid("read request: longer than %d bytes", maxLine)
	errManyLong = &Error{Message: fmt.Sprintf("read request: %d others are longer than %d bytes, too", maxLong, shortLine), Status: http.StatusServiceUnavailable}
)

// longLines are those that are longer than shortLine and not read to their ends.
type longLines struct {
	mu sync.Mutex
	n  int
}

// take reports whether there may be one more; put takes it back.
func (l *longLines) take() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.n >= maxLong {
		return false
	}
	l.n++
	return true
}

func (l *longLines) put() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.n--
}

// lines reads the lines of one connection.
type lines struct {
	from   io.Reader
	long   *longLines
	small  [shortLine]byte
	buf    []byte // what was read, in small unless isLong
	done   int    // of buf: the line that next has returned
	isLong bool
}

func newLines(from io.Reader, long *longLines) *lines {
	l := &lines{from: from, long: long}
	l.buf = l.small[:0]
	return l
}

// next returns a line without its end, until it is called again. What ends without an end of line was
// not said to the end, and is none. The error is an *Error where the line is refused.
func (l *lines) next() ([]byte, error) {
	l.shrink()
	for {
		if i := bytes.IndexByte(l.buf, '\n'); i >= 0 {
			l.done = i + 1
			return l.buf[:i], nil
		}
		if err := l.grow(); err != nil {
			return nil, err
		}
		n, err := l.from.Read(l.buf[len(l.buf):cap(l.buf)])
		l.buf = l.buf[:len(l.buf)+n]
		if n == 0 && err != nil {
			return nil, err
		}
	}
}

// shrink forgets the line that was returned, and a long buffer that is not needed.
func (l *lines) shrink() {
	rest := l.buf[l.done:]
	l.done = 0
	if l.isLong && len(rest) > shortLine {
		l.buf = l.buf[:copy(l.buf, rest)]
		return
	}
	l.buf = l.small[:copy(l.small[:], rest)]
	l.close()
}

// grow makes room where there is none.
func (l *lines) grow() error {
	switch {
	case len(l.buf) < cap(l.buf):
		return nil
	case l.isLong:
		return errLineLong
	case !l.long.take():
		return errManyLong
	}
	l.isLong = true
	l.buf = append(make([]byte, 0, maxLine), l.buf...)
	return nil
}

// close ends the reading.
func (l *lines) close() {
	if l.isLong {
		l.isLong = false
		l.long.put()
	}
}
