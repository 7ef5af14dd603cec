//go:build linux

package main

import (
	"bufio"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// idleDeadline bounds the opening of all idle flows, and the proof that they are
// still there.
const idleDeadline = 30 * time.Second

// idleFlows opens o.Count TCP connections, proves each by a byte, holds them, and
// proves each again. It prints "base" before and "open N" when N are open, and
// waits for a line of the harness each time, which looks at the driver's
// processes then. Flows that could not be opened count as failed.
func idleFlows(o order) (map[string]float64, int, error) {
	in := bufio.NewReader(os.Stdin)
	if err := meet(in, "base"); err != nil {
		return nil, 0, err
	}
	fds, err := openIdleFlows(o)
	defer func() {
		for _, fd := range fds {
			rawClose(fd)
		}
	}()
	if len(fds) == 0 {
		return nil, o.Count, err
	}
	if err := meet(in, fmt.Sprintf("open %d", len(fds))); err != nil {
		return nil, 0, err
	}
	held := stillHeld(fds)
	return withConns(map[string]float64{"flows": float64(held)}, o.Count), o.Count - held, nil
}

// stillHeld counts the connections over which a byte comes back.
func stillHeld(fds []int) (held int) {
	deadline := time.Now().Add(idleDeadline)
	for _, fd := range fds {
		if time.Now().After(deadline) {
			break
		}
		if echoByte(fd) == nil {
			held++
		}
	}
	return held
}

// openIdleFlows opens connections until it has o.Count, one fails, or it takes too
// long; the error says why there are fewer.
func openIdleFlows(o order) (fds []int, err error) {
	to := targets(o)
	deadline := time.Now().Add(idleDeadline)
	for i := range o.Count {
		if time.Now().After(deadline) {
			return fds, fmt.Errorf("only %d of %d flows open after %v", i, o.Count, idleDeadline)
		}
		fd, err := openIdle(&to[i%len(to)])
		if err != nil {
			return fds, fmt.Errorf("flow %d of %d: %w", i+1, o.Count, err)
		}
		fds = append(fds, fd)
	}
	return fds, nil
}

// openIdle connects with a time-out of a few seconds and proves the connection.
func openIdle(to *sockaddr) (int, error) {
	fd, err := rawSocket(to, unix.SOCK_STREAM)
	if err != nil {
		return -1, err
	}
	tv := unix.Timeval{Sec: 3}
	err = cmpErr(
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv), // bounds connect too
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv),
		rawConnect(fd, to),
	)
	if err == nil {
		err = echoByte(fd)
	}
	if err != nil {
		rawClose(fd)
		return -1, err
	}
	return fd, nil
}

// echoByte sends a byte and waits for it.
func echoByte(fd int) error {
	var b [1]byte
	if _, err := rawSend(fd, b[:]); err != nil {
		return err
	}
	if n, err := rawRecv(fd, b[:], 0); n != 1 {
		return cmpErr(err, unix.ENODATA)
	}
	return nil
}

// meet prints word and waits for the harness to answer with a line.
func meet(in *bufio.Reader, word string) error {
	fmt.Println(word)
	if _, err := in.ReadString('\n'); err != nil {
		return fmt.Errorf("stdin after %q: %w", word, err)
	}
	return nil
}
