package nsagent

import (
	"encoding/binary"
	"net/netip"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// Whoever may send to our netlink socket cannot answer for the kernel, nor keep us.
func TestWhereHearsTheKernelOnly(t *testing.T) {
	open := func() int {
		fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
		if err != nil {
			t.Fatal(err)
		}
		return fd
	}
	ours, theirs := open(), open()
	a := &Agent{spec: Spec{TUN: TUN{Name: "lo"}}}
	a.routes.socket = os.NewFile(uintptr(ours), "rtnetlink")
	defer a.routes.close()
	defer unix.Close(theirs)
	where := func(s string) (Place, error) { return a.Where(netip.MustParseAddr(s)) }
	if p, err := where("127.0.0.1"); p != PlaceLocal || err != nil {
		t.Fatalf("at %d, %v", p, err)
	}
	own, err := unix.Getsockname(ours)
	if err != nil {
		t.Fatal(err)
	}
	forge := func(seq uint32) {
		t.Helper()
		b := binary.NativeEndian.AppendUint32(nil, unix.SizeofNlMsghdr+4)
		b = binary.NativeEndian.AppendUint16(b, unix.NLMSG_ERROR)
		b = binary.NativeEndian.AppendUint16(b, 0)
		b = binary.NativeEndian.AppendUint32(b, seq)
		b = binary.NativeEndian.AppendUint32(b, 0)
		b = binary.NativeEndian.AppendUint32(b, ^uint32(unix.ENETUNREACH)+1)
		if err := unix.Sendto(theirs, b, unix.MSG_DONTWAIT, own); err != nil {
			missing(t, "netlink between users: %v", err)
		}
	}
	forge(a.routes.seq + 1)
	if p, err := where("127.0.0.2"); p != PlaceLocal || err != nil {
		t.Errorf("behind a forged answer: at %d, %v", p, err)
	}
	for range 2 * strangersMost {
		forge(0)
	}
	for i, s := range []string{"127.0.0.3", "127.0.0.4", "127.0.0.5"} {
		if p, err := where(s); err != nil && i == 2 || err == nil && p != PlaceLocal {
			t.Errorf("question %d behind many messages of others: at %d, %v", i+1, p, err)
		}
	}
}
