package probe

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
)

// errNoPing says that neither a ping socket nor a raw one can be had.
var errNoPing = errors.New("no ping socket")

const (
	icmpHeader = 8  // of an echo message, RFC 792, RFC 4443 section 4.1
	pingSize   = 56 // payload, as ping(8) has it

	request4, reply4 = 8, 0
	request6, reply6 = 128, 129
)

// ping sends echo requests to a until one is answered and tells by which kind of
// socket. An ICMP error about a request is the error returned.
func ping(ctx context.Context, a netip.Addr) (kind string, err error) {
	conn, kind, err := openPing(ctx, a)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	payload := randomBytes(pingSize)
	reply := byte(reply4)
	if a.Is6() {
		reply = reply6
	}
	buf := make([]byte, 1500)
	tries, err := repeat(ctx, conn, echoRequest(a, payload), func() (bool, error) {
		n, err := readMessage(conn, buf)
		return err == nil && isReply(buf[:n], reply, payload), err
	})
	if tries != "" {
		kind += ", " + tries
	}
	return kind, err
}

// openPing opens a socket whose messages go to a: an unprivileged one or, failing
// that, a raw one.
func openPing(ctx context.Context, a netip.Addr) (net.Conn, string, error) {
	conn, err := pingSocket(a)
	if err == nil {
		return conn, "ping socket", nil
	}
	network := "ip4:icmp"
	if a.Is6() {
		network = "ip6:ipv6-icmp"
	}
	if ctx.Err() != nil {
		return nil, "", context.Cause(ctx)
	}
	raw, rawErr := new(net.Dialer).DialContext(ctx, network, a.String())
	if rawErr != nil {
		return nil, "", fmt.Errorf("%w: %s; raw socket: %s", errNoPing, why(err), why(rawErr))
	}
	return raw, "raw socket", nil
}

// readMessage reads an ICMP message, without an IP header.
func readMessage(conn net.Conn, buf []byte) (int, error) {
	if raw, ok := conn.(*net.IPConn); ok {
		n, _, err := raw.ReadFrom(buf) // unlike Read, cuts an IPv4 header off
		return n, err
	}
	return conn.Read(buf)
}

// echoRequest is the message to a. A ping socket sets identifier and checksum itself,
// and the kernel the checksum of any ICMPv6 message (RFC 3542 section 3.1).
func echoRequest(a netip.Addr, payload []byte) []byte {
	b := make([]byte, icmpHeader, icmpHeader+len(payload))
	b[0] = request4
	if a.Is6() {
		b[0] = request6
	}
	copy(b[4:], payload[:4]) // identifier and sequence number: random, too
	b = append(b, payload...)
	if a.Is4() {
		binary.BigEndian.PutUint16(b[2:], checksum(b))
	}
	return b
}

// isReply tells whether b answers the request that carried payload.
func isReply(b []byte, reply byte, payload []byte) bool {
	return len(b) >= icmpHeader && b[0] == reply && b[1] == 0 && bytes.Equal(b[icmpHeader:], payload)
}

// checksum is the internet checksum (RFC 1071) of b, of even length.
func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
