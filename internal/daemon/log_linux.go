package daemon

import (
	"bytes"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// logQueue is how many lines wait for whoever reads the log.
	logQueue = 1024
	// logPatience is how long the end of an engine waits until they are read.
	logPatience = time.Second
)

// logWriter passes lines on without waiting: a log that nobody reads, a full pipe or a
// terminal after Ctrl-S, must stop neither the guest's traffic nor the end of an engine.
// What does not fit is counted, and said as soon as there is room.
type logWriter struct {
	to   io.Writer
	lost atomic.Int64
	done chan struct{} // closed when every line is written

	mu    sync.Mutex  // guards a send to lines against close
	lines chan []byte // nil after close
}

func newLogWriter(to io.Writer) *logWriter {
	l := &logWriter{to: to, done: make(chan struct{}), lines: make(chan []byte, logQueue)}
	go l.run(l.lines) // ends with close, or with the process if the log is stuck
	return l
}

// Write implements io.Writer. It takes one line and never fails.
func (l *logWriter) Write(line []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case l.lines <- bytes.Clone(line): // never, after close
	default:
		l.lost.Add(1)
	}
	return len(line), nil
}

func (l *logWriter) run(lines <-chan []byte) {
	defer close(l.done)
	for line := range lines {
		l.to.Write(line)
		if n := l.lost.Swap(0); n > 0 {
			slog.New(slog.NewTextHandler(l.to, nil)).Warn("lines of this log are lost: they were not read in time", slog.Int64("lines", n))
		}
	}
}

// close waits until what came before is written, but not for long.
func (l *logWriter) close() {
	l.mu.Lock()
	close(l.lines)
	l.lines = nil
	l.mu.Unlock()
	select {
	case <-l.done:
	case <-time.After(logPatience):
	}
}
