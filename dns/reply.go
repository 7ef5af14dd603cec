package dns

import "encoding/binary"

// Response codes, RFC 1035 section 4.1.1.
const (
	rcodeSuccess        = 0
	rcodeFormatError    = 1
	rcodeServerFailure  = 2
	rcodeNameError      = 3
	rcodeNotImplemented = 4
	rcodeRefused        = 5
)

// Extended errors, RFC 8914: they tell a person with dig whose fault it was.
const (
	edeOption       = 15 // option code
	edeOther        = 0
	edeNetworkError = 23
	edeNone         = 0xFFFF // ours: no extended error
)

// ourUDPSize is what our own OPT records offer to take, in bytes. 1232 is the
// value of DNS flag day 2020; queries of any size are taken in fact.
const ourUDPSize = 1232

// reply makes an answer without records.
func (q *query) reply(rcode byte) []byte {
	return q.replyWith(rcode, edeNone, "")
}

// replyWith adds an extended error for guests that speak EDNS0.
func (q *query) replyWith(rcode byte, ede uint16, text string) []byte {
	r := make([]byte, headerLen, q.questionEnd+64+len(text))
	copy(r, q.msg[:4])
	r[2] = r[2]&^(flagAA|flagTC) | flagQR
	r[3] = r[3]&flagCD | flagRA | rcode
	if q.questionEnd > headerLen {
		copy(r[4:6], q.msg[4:6])
		r = append(r, q.msg[headerLen:q.questionEnd]...)
	}
	if q.edns {
		r = q.appendOPT(r, ede, text)
	}
	return r
}

// truncatedReply is for an answer that does not fit: come back over TCP.
func (q *query) truncatedReply(rcode byte) []byte {
	r := q.reply(rcode)
	r[2] |= flagTC
	return r
}

// appendOPT adds the OPT record that RFC 6891 section 6.1.1 wants in an answer
// to a query that has one.
func (q *query) appendOPT(r []byte, ede uint16, text string) []byte {
	binary.BigEndian.PutUint16(r[10:], 1)
	var flags byte
	if q.dnssecOK {
		flags = 0x80 // RFC 3225 section 3: the DO bit is copied
	}
	r = append(r, 0, 0, typeOPT, ourUDPSize>>8, ourUDPSize&0xFF, 0, 0, flags, 0)
	if ede == edeNone {
		return append(r, 0, 0)
	}
	n := 2 + len(text)
	r = binary.BigEndian.AppendUint16(r, uint16(n+4))
	r = binary.BigEndian.AppendUint16(r, edeOption)
	r = binary.BigEndian.AppendUint16(r, uint16(n))
	r = binary.BigEndian.AppendUint16(r, ede)
	return append(r, text...)
}
