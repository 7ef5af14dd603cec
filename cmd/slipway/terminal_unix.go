//go:build unix

package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/slipway-net/slipway/internal/api"
)

// forwarded are the signals that an exec passes on to its command.
var forwarded = []os.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2}

// execOn runs a command in an engine: with our own files, or, when they are a terminal,
// with a terminal of its own between: the command is in another session than we are,
// and one terminal belongs to one session.
func execOn(ctx context.Context, c *api.Client, r api.ExecRequest, signals <-chan os.Signal) (int, error) {
	stdio := [3]*os.File{os.Stdin, os.Stdout, os.Stderr}
	if !term.IsTerminal(int(os.Stdin.Fd())) || !term.IsTerminal(int(os.Stdout.Fd())) {
		return c.Exec(ctx, r, stdio, signals)
	}
	master, slave, err := pty.Open()
	if err != nil {
		return 0, fmt.Errorf("open terminal: %w", err)
	}
	defer master.Close()
	defer slave.Close()
	stdio[0], stdio[1] = slave, slave
	if term.IsTerminal(int(os.Stderr.Fd())) {
		stdio[2] = slave
	}
	r.TTY = true
	pty.InheritSize(os.Stdin, master)
	was, err := term.MakeRaw(int(os.Stdin.Fd()))
	if err != nil {
		return 0, fmt.Errorf("set terminal raw: %w", err)
	}
	defer term.Restore(int(os.Stdin.Fd()), was)
	s := startScreen(master)
	code, err := c.ExecStarted(ctx, r, stdio, signals, func() { slave.Close() })
	s.finish()
	return code, err
}

// lastOutput is how long we wait for output after the command has ended, when a process that
// it left keeps the terminal open, and mostOutput how long we read on while there is some.
const (
	lastOutput = 200 * time.Millisecond
	mostOutput = 10 * time.Second
)

// screen moves bytes and sizes between our terminal and the command's.
type screen struct {
	master *os.File
	resize chan os.Signal
	output chan struct{} // closed when everything was shown
	sizes  sync.WaitGroup
}

func startScreen(master *os.File) *screen {
	s := &screen{master: master, resize: make(chan os.Signal, 1), output: make(chan struct{})}
	signal.Notify(s.resize, syscall.SIGWINCH)
	s.sizes.Go(func() {
		for range s.resize {
			pty.InheritSize(os.Stdin, master) // the kernel tells the command
		}
	})
	go func() {
		defer close(s.output)
		io.Copy(os.Stdout, master) // ends with EIO when nobody has the other end open
	}()
	// Reading our own terminal cannot be interrupted: this ends with the program.
	go io.Copy(master, os.Stdin)
	return s
}

// drain waits until everything was shown that the command has written. Whoever reads our own
// terminal may be slow.
func (s *screen) drain() {
	for end := time.Now().Add(mostOutput); time.Now().Before(end); {
		select {
		case <-s.output:
			return
		case <-time.After(lastOutput):
		}
		if !readable(s.master) {
			return
		}
	}
}

// readable reports whether there is something to read.
func readable(f *os.File) (yes bool) {
	raw, err := f.SyscallConn()
	if err != nil {
		return false
	}
	raw.Control(func(fd uintptr) {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		unix.Poll(p, 0)
		yes = p[0].Revents&unix.POLLIN != 0
	})
	return yes
}

// finish shows what the command has written and ends everything.
func (s *screen) finish() {
	s.drain()
	s.master.Close()
	<-s.output
	signal.Stop(s.resize)
	close(s.resize)
	s.sizes.Wait()
}
