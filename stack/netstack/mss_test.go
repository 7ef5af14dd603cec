package netstack

import (
	"context"
	"fmt"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/slipway-net/slipway/internal/flow"
	"github.com/slipway-net/slipway/stack/link"
)

// segmentWith is a segment of family 0's guest with options and a window of 64 KiB.
func segmentWith(seq, ack uint32, flags header.TCPFlags, options []byte) []byte {
	f := families[0]
	b := make([]byte, header.TCPMinimumSize+len(options))
	h := header.TCP(b)
	h.Encode(&header.TCPFields{
		SrcPort: f.guest.Port(), DstPort: f.target.Port(), SeqNum: seq, AckNum: ack,
		DataOffset: uint8(len(b)), Flags: flags, WindowSize: 65535,
	})
	copy(b[header.TCPMinimumSize:], options)
	h.SetChecksum(^h.CalculateChecksum(pseudo(guest4, target4, header.TCPProtocolNumber, len(b))))
	return ipPacket(guest4, target4, header.TCPProtocolNumber, b)
}

// A guest may say any maximum segment size: it gets its data in pieces no larger, but
// none so small that they harm us, and none larger than the link's MTU.
func TestGuestMSS(t *testing.T) {
	for _, tt := range []struct {
		mss  uint16
		most int
	}{{0, 1460}, {1, 536}, {11, 536}, {12, 536}, {13, 536}, {39, 536}, {40, 536}, {41, 536}, {536, 536}, {1400, 1400}, {1460, 1460}, {9000, 1460}, {65535, 1460}} {
		for _, ts := range []bool{false, true} {
			t.Run(fmt.Sprintf("%d/%v", tt.mss, ts), func(t *testing.T) {
				b := start(t, 1500)
				b.fwd.decide = func(context.Context, flow.Tuple) flow.Verdict { return flow.Verdict{Answer: flow.Connect} }
				b.fwd.relay = func(_ context.Context, c flow.Conn, _ flow.Verdict) {
					defer c.Abort()
					c.Write(pattern(10000))
					c.Read(make([]byte, 1))
				}
				opts := []byte{2, 4, byte(tt.mss >> 8), byte(tt.mss), 4, 2, 1, 1}
				stamp := []byte{1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0}
				if !ts {
					stamp = nil
				}
				b.send(link.Header{}, segmentWith(1000, 0, header.TCPFlagSyn, append(opts, stamp...)))
				pkt, _ := b.receive()
				synack := header.TCP(header.IPv4(pkt).Payload())
				b.send(link.Header{}, segmentWith(1001, synack.SequenceNumber()+1, header.TCPFlagAck, stamp))
				pkt, h := b.receive()
				data := header.TCP(header.IPv4(pkt).Payload())
				for data.Flags()&header.TCPFlagSyn != 0 { // repeated: the machine has stood still
					pkt, h = b.receive()
					data = header.TCP(header.IPv4(pkt).Payload())
				}
				size := len(data.Payload())
				if h.GSOType != link.GSONone {
					size = int(h.GSOSize)
				}
				if size < 1 || size > tt.most {
					t.Errorf("segments of %d bytes, %+v", size, h)
				}
				b.send(link.Header{}, segmentWith(1001, synack.SequenceNumber()+1, header.TCPFlagRst, stamp))
			})
		}
	}
}
