package probe

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"time"
)

const (
	// streamSize is what echoTCP sends, in bytes: more than a segment, and less
	// than what an echo service and both kernels buffer while nobody reads.
	streamSize = 16 << 10
	// datagramSize is what echoUDP sends, in bytes: it crosses every IPv6 link
	// in one piece (RFC 8200 section 5).
	datagramSize = 1200
)

// randomBytes makes an echo that cannot be somebody else's.
func randomBytes(n int) []byte {
	b := make([]byte, n)
	rand.Read(b) // never fails
	return b
}

// echoTCP connects, sends bytes and an end of file, and wants both back.
func echoTCP(ctx context.Context, target netip.AddrPort) (string, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", target.String())
	if err != nil {
		return "", err
	}
	defer conn.Close()
	defer interrupt(ctx, conn)()
	sent := randomBytes(streamSize)
	if _, err := conn.Write(sent); err != nil {
		return "", err
	}
	// A connection that was reset meanwhile cannot be shut down (ENOTCONN), and
	// reading tells why.
	closeErr := conn.(*net.TCPConn).CloseWrite()
	got, err := io.ReadAll(io.LimitReader(conn, streamSize+1))
	if err = cmp.Or(err, closeErr); err != nil {
		return "", err
	}
	if !bytes.Equal(got, sent) {
		return "", fmt.Errorf("%d bytes came back that are not the %d sent", len(got), len(sent))
	}
	return "16 KiB and end of file came back", nil
}

// echoUDP sends a datagram until it comes back.
func echoUDP(ctx context.Context, target netip.AddrPort) (string, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "udp", target.String())
	if err != nil {
		return "", err
	}
	defer conn.Close()
	sent, buf := randomBytes(datagramSize), make([]byte, datagramSize+1)
	return repeat(ctx, conn, sent, func() (bool, error) {
		n, err := conn.Read(buf)
		return err == nil && bytes.Equal(buf[:n], sent), err
	})
}

// repeat writes sent to conn and calls read, which blocks, until it sees the answer.
// It says so when one try was not enough.
func repeat(ctx context.Context, conn net.Conn, sent []byte, read func() (bool, error)) (string, error) {
	defer interrupt(ctx, conn)()
	for tries := 1; ctx.Err() == nil; tries++ {
		if _, err := conn.Write(sent); err != nil {
			return "", err
		}
		until := time.Now().Add(repeatAt)
		if end, ok := ctx.Deadline(); ok && end.Before(until) {
			until = end
		}
		conn.SetReadDeadline(until)
		for ctx.Err() == nil {
			answered, err := read()
			if answered && tries == 1 {
				return "", nil
			}
			if answered {
				return fmt.Sprintf("at try %d", tries), nil
			}
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if err != nil {
				return "", err
			}
		}
	}
	return "", context.Cause(ctx)
}

// interrupt makes conn's blocked calls return when ctx ends. Call what it returns
// before conn is closed.
func interrupt(ctx context.Context, conn net.Conn) (stop func() bool) {
	return context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
}
