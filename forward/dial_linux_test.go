package forward

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/slipway-net/slipway/internal/flow"
)

func TestDialRefused(t *testing.T) {
	for _, network := range []string{"127.0.0.1:0", "[::1]:0"} {
		ln, err := net.Listen("tcp", network)
		if err != nil {
			t.Fatal(err)
		}
		a := ln.Addr().(*net.TCPAddr).AddrPort()
		ln.Close()
		_, err = dialTCP(t.Context(), a)
		var de *DialError
		if !errors.As(err, &de) || !errors.Is(err, syscall.ECONNREFUSED) || de.Target != a {
			t.Fatalf("dial = %v", err)
		}
		if v := de.verdict(a.Addr().Is4()); v.Answer != flow.Reset {
			t.Errorf("verdict %+v", v)
		}
	}
}

// inNetNS runs f on a thread in a fresh network namespace that ip has prepared with
// the given commands. The thread is not used again.
func inNetNS(t *testing.T, commands []string, f func()) {
	t.Helper()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		done <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return err
			}
			for _, c := range commands {
				// A child of this thread is born in its namespace.
				if out, err := exec.Command("ip", strings.Fields(c)...).CombinedOutput(); err != nil {
					return errors.New(c + ": " + string(out))
				}
			}
			f()
			return nil
		}()
	}()
	if err := <-done; err != nil {
		if os.Getenv("NETNS_TESTS") == "require" {
			t.Fatalf("network namespaces unavailable: %v", err)
		}
		t.Skipf("network namespaces unavailable: %v", err)
	}
}

// What connect(2) and the error queue say becomes what a router would have sent. The
// routes are the host's own; messages from the network are tested end to end.
func TestDialLocalErrors(t *testing.T) {
	setUp := []string{
		"link set lo up",
		"addr add 198.51.100.1/32 dev lo",
		"addr add 2001:db8::1/128 dev lo nodad",
		"route add unreachable 203.0.113.1/32",
		"route add prohibit 203.0.113.2/32",
		"route add unreachable 2001:db8:1::1/128",
		"route add prohibit 2001:db8:1::2/128",
	}
	tests := []struct {
		target string
		want   flow.ICMP
	}{
		{"192.0.2.1:80", flow.ICMP{Type: 3, Code: 0}},
		{"203.0.113.1:80", flow.ICMP{Type: 3, Code: 1}},
		{"203.0.113.2:80", flow.ICMP{Type: 3, Code: 13}},
		{"[2001:db8:2::1]:80", flow.ICMP{Type: 1, Code: 0}},
		{"[2001:db8:1::1]:80", flow.ICMP{Type: 1, Code: 0}},
		{"[2001:db8:1::2]:80", flow.ICMP{Type: 1, Code: 1}},
	}
	inNetNS(t, setUp, func() {
		for _, tt := range tests {
			a := netip.MustParseAddrPort(tt.target)
			_, err := dialTCP(context.Background(), a)
			var de *DialError
			if !errors.As(err, &de) {
				t.Errorf("%s: dial = %v", tt.target, err)
				continue
			}
			if v := de.verdict(a.Addr().Is4()); v.Answer != flow.Unreachable || v.ICMP != tt.want {
				t.Errorf("%s: %v, verdict %+v, want %+v", tt.target, de.Err, v, tt.want)
			}
		}
	})
}

// A dial into the void ends when its guest gives up, and leaves no descriptor.
func TestDialCancelled(t *testing.T) {
	setUp := []string{
		"link add v0 type veth peer name v1",
		"link set v0 up",
		"link set v1 up",
		"addr add 198.51.100.1/24 dev v0",
		"neigh add 198.51.100.9 lladdr 02:00:00:00:00:01 dev v0",
	}
	inNetNS(t, setUp, func() {
		before := countFDs(t)
		ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
		defer cancel()
		_, err := dialTCP(ctx, netip.MustParseAddrPort("198.51.100.9:80"))
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("dial = %v", err)
		}
		for end := time.Now().Add(patience); countFDs(t) > before; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Errorf("more descriptors than before, %d", before)
				break
			}
		}
	})
}

// A port that nobody listens on is refused, also on a host without IPv6.
func TestDialAnyPrefersRefusal(t *testing.T) {
	setUp := []string{"link set lo up", "addr del ::1/128 dev lo"}
	inNetNS(t, setUp, func() {
		v4, v6 := netip.MustParseAddrPort("127.0.0.1:9"), netip.MustParseAddrPort("[::1]:9")
		for _, order := range [][]netip.AddrPort{{v4, v6}, {v6, v4}} {
			_, err := dialAny(context.Background(), order)
			var de *DialError
			if !errors.As(err, &de) || de.verdict(true).Answer != flow.Reset {
				t.Errorf("dial of %v = %v, want it refused", order, err)
			}
		}
	})
}

func FuzzExtendedErr(f *testing.F) {
	f.Add(make([]byte, 16))
	f.Add(append(make([]byte, 16), 2, 0, 0, 0, 198, 51, 100, 1, 0, 0, 0, 0, 0, 0, 0, 0))
	f.Add(append(make([]byte, 16), 10, 0, 0, 0))
	f.Fuzz(func(t *testing.T, b []byte) { parseExtendedErr(b) })
}
