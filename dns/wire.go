package dns

import (
	"encoding/binary"
	"errors"
)

// Everything here reads messages of the guest or of an upstream, both hostile,
// without a parser's idea of what is inside: RFC 1035 section 4.1, RFC 6891
// section 6.1.2. Offsets only grow, so every loop ends with the message.

const (
	headerLen     = 12    // bytes
	maxMessage    = 65535 // bytes: the length field over TCP has 16 bits
	minUDPSize    = 512   // bytes a client takes in a datagram without EDNS0
	maxNameLen    = 255   // bytes of a name with its final zero
	questionFixed = 4     // bytes of type and class behind the name

	flagQR = 1 << 7 // byte 2: this is a response
	flagAA = 1 << 2 // byte 2: authoritative
	flagTC = 1 << 1 // byte 2: truncated
	flagRD = 1 << 0 // byte 2: recursion desired
	flagRA = 1 << 7 // byte 3: recursion available
	flagCD = 1 << 4 // byte 3: checking disabled

	typeOPT = 41
)

var errMalformed = errors.New("malformed dns message")

// query is a message from the guest, read as far as we need.
type query struct {
	msg         []byte // the whole message; ours
	questionEnd int    // offset behind the question section
	name        string // of the only question in lower-case wire form; "" if there is not exactly one
	qtype       uint16 // of that question
	qclass      uint16
	edns        bool // an OPT record is there
	dnssecOK    bool // its DO bit
	udpSize     int  // bytes the guest takes in a datagram, at least 512
}

// isQuery reports whether msg has a header that says so. Anything else is not
// worth an answer: answering a response could start a loop.
func isQuery(msg []byte) bool {
	return len(msg) >= headerLen && len(msg) <= maxMessage && msg[2]&flagQR == 0
}

// parseQuery reads msg, for which isQuery holds. When it fails, the query still
// has what reply needs.
func parseQuery(msg []byte) (query, error) {
	q := query{msg: msg, questionEnd: headerLen, udpSize: minUDPSize}
	n := int(binary.BigEndian.Uint16(msg[4:]))
	off := headerLen
	for range n {
		name, next, err := readName(msg, off)
		if err != nil || len(msg)-next < questionFixed {
			return q, errMalformed
		}
		q.name = name
		q.qtype = binary.BigEndian.Uint16(msg[next:])
		q.qclass = binary.BigEndian.Uint16(msg[next+2:])
		off = next + questionFixed
	}
	q.questionEnd = off
	if n != 1 {
		q.name = ""
	}
	q.readOPT()
	return q, nil
}

// readOPT looks for the OPT record. A message whose records cannot be read has
// none; what to think of the rest is the upstream's business.
func (q *query) readOPT() {
	records := 0
	for at := 6; at < headerLen; at += 2 {
		records += int(binary.BigEndian.Uint16(q.msg[at:]))
	}
	off := q.questionEnd
	for range records {
		_, next, err := readName(q.msg, off)
		const fixed = 10 // type, class, TTL, length
		if err != nil || len(q.msg)-next < fixed {
			return
		}
		rr := q.msg[next:]
		if binary.BigEndian.Uint16(rr) == typeOPT {
			q.edns = true
			q.udpSize = max(minUDPSize, int(binary.BigEndian.Uint16(rr[2:])))
			q.dnssecOK = rr[6]&0x80 != 0
			return
		}
		off = next + fixed + int(binary.BigEndian.Uint16(rr[8:]))
		if off > len(q.msg) {
			return
		}
	}
}

// readName reads the name at off and returns it in lower-case wire form with the
// offset behind it. A compression pointer ends the name and is not followed: in
// a question it is not used, and of other names only the length matters.
func readName(msg []byte, off int) (name string, next int, err error) {
	var buf [maxNameLen]byte
	n := 0
	for {
		if off >= len(msg) {
			return "", 0, errMalformed
		}
		l := int(msg[off])
		switch {
		case l >= 0xC0 && off+1 < len(msg):
			return string(buf[:n]) + string(msg[off:off+2]), off + 2, nil
		case l > 63 || off+1+l > len(msg) || n+1+l > maxNameLen:
			return "", 0, errMalformed
		}
		buf[n] = byte(l)
		for i, c := range msg[off+1 : off+1+l] {
			buf[n+1+i] = lower(c)
		}
		n += 1 + l
		off += 1 + l
		if l == 0 {
			return string(buf[:n]), off, nil
		}
	}
}

func lower(c byte) byte {
	if 'A' <= c && c <= 'Z' {
		return c + 'a' - 'A'
	}
	return c
}

// id returns the message's ID.
func id(msg []byte) uint16 { return binary.BigEndian.Uint16(msg) }

// opcode returns the opcode; msg has a header.
func opcode(msg []byte) byte { return msg[2] >> 3 & 0xF }

// rcode returns the response code without its extension; msg has a header.
func rcode(msg []byte) byte { return msg[3] & 0xF }

// truncated reports the TC bit; msg has a header.
func truncated(msg []byte) bool { return msg[2]&flagTC != 0 }

// answers reports whether msg is a reply with this ID to q. The question must be
// repeated, in any case of letters; an error without NXDOMAIN's weight may come
// without one, as some servers send FORMERR and REFUSED.
func (q *query) answers(msg []byte, wantID uint16) bool {
	if len(msg) < headerLen || msg[2]&flagQR == 0 || id(msg) != wantID || opcode(msg) != opcode(q.msg) {
		return false
	}
	questions := binary.BigEndian.Uint16(msg[4:])
	if questions == 0 && rcode(msg) != rcodeSuccess && rcode(msg) != rcodeNameError {
		return true
	}
	if questions != binary.BigEndian.Uint16(q.msg[4:]) {
		return false
	}
	off, mine := headerLen, headerLen
	for range questions {
		a, next, err := readName(msg, off)
		b, mineNext, mineErr := readName(q.msg, mine)
		off, mine = next+questionFixed, mineNext+questionFixed
		if err != nil || mineErr != nil || a != b || off > len(msg) ||
			string(msg[next:off]) != string(q.msg[mineNext:mine]) {
			return false
		}
	}
	return true
}
