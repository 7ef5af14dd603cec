package publish

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// filer is a socket as package net has it.
type filer interface {
	File() (*os.File, error)
	Close() error
}

// pass returns the file of a socket, the only one that is left.
func pass(t *testing.T, s filer) *os.File {
	t.Helper()
	defer s.Close()
	f, err := s.File()
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func listenTCP(t *testing.T, network, addr string) (*os.File, uint16) {
	t.Helper()
	ln, err := net.Listen(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	return pass(t, ln.(*net.TCPListener)), ln.Addr().(*net.TCPAddr).AddrPort().Port()
}

func listenUDP(t *testing.T, network, addr string) (*os.File, uint16) {
	t.Helper()
	c, err := net.ListenPacket(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	return pass(t, c.(*net.UDPConn)), c.LocalAddr().(*net.UDPAddr).AddrPort().Port()
}

func TestInherited(t *testing.T) {
	tests := []struct {
		network, addr string
		spec          string // of %d
		listens       []string
	}{
		{"tcp4", "127.0.0.1:0", "127.0.0.1:%d:80", []string{"127.0.0.1"}},
		{"tcp4", "0.0.0.0:0", "%d:80", []string{"0.0.0.0", "::"}}, // one passed on, one of our own
		{"tcp6", "[::]:0", "[::]:%d:80", []string{"::"}},
		{"tcp", ":0", "%d:80", []string{"::"}}, // both families on one socket
		{"udp4", "127.0.0.1:0", "127.0.0.1:%d:53/udp", []string{"127.0.0.1"}},
		{"udp6", "[::1]:0", "[::1]:%d:53/udp", []string{"::1"}},
		{"udp", ":0", "%d:53/udp", []string{"::"}},
	}
	for _, tt := range tests {
		t.Run(tt.network+" "+tt.addr, func(t *testing.T) {
			listen := listenTCP
			if strings.HasPrefix(tt.network, "udp") {
				listen = listenUDP
			}
			file, port := listen(t, tt.network, tt.addr)
			b, _ := newBook(t, Config{Inherited: []*os.File{file}})
			s := spec(t, fmt.Sprintf(tt.spec, port))
			for range 2 { // what is withdrawn can be published again
				p := add(t, b, "me", s)
				if got := addrs(p); !slices.Equal(got, tt.listens) {
					t.Errorf("listens on %v, want %v", got, tt.listens)
				}
				ask := p.Listens
				if tt.addr == ":0" {
					ask = append(ask, netip.AddrPortFrom(loop4, port))
					if g := p.GuestFor(any6); g.Addr() != own4 {
						t.Errorf("a socket of both families leads to %v", g)
					}
				}
				for _, a := range ask {
					if got := tells(t, s.Proto, a); got != fmt.Sprint(p.ID) {
						t.Errorf("%v tells %q, want %d", a, got, p.ID)
					}
				}
				if err := b.Remove(p.ID); err != nil {
					t.Error(err)
				}
			}
			b.Close()
			if file.Close() == nil {
				t.Error("the Book has not closed the file")
			}
		})
	}
}

// A socket of both families is not the one of [::] alone.
func TestInheritedDualForOneFamily(t *testing.T) {
	file, port := listenTCP(t, "tcp", ":0")
	b, _ := newBook(t, Config{Inherited: []*os.File{file}})
	for _, s := range []string{"[::]:%d:80", "0.0.0.0:%d:80", "127.0.0.1:%d:80"} {
		var conflict *ConflictError
		if _, err := b.Add("me", spec(t, fmt.Sprintf(s, port))); !errors.As(err, &conflict) ||
			conflict.Holder != (PassedOn{netip.AddrPortFrom(any6, port), true}) || !strings.Contains(conflict.Hint(), "BindIPv6Only") {
			t.Errorf(s+": %v, want a conflict", port, err)
		}
	}
}

// A socket that was passed on is not blamed for what it has nothing to do with.
func TestInheritedBeside(t *testing.T) {
	file, port := listenTCP(t, "tcp4", "0.0.0.0:0")
	b, _ := newBook(t, Config{Inherited: []*os.File{file}})
	var bad *SpecError
	if _, err := b.Add("me", spec(t, fmt.Sprintf("192.0.2.9:%d:80", port))); !errors.As(err, &bad) || !strings.HasSuffix(err.Error(), "is not an address of this host") {
		t.Errorf("%v, want that the host has not the address", err)
	}
}

func TestInheritedBad(t *testing.T) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	conn, err := net.Dial("tcp4", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	connected, err := net.Dial("udp4", "127.0.0.1:9")
	if err != nil {
		t.Fatal(err)
	}
	local, err := net.Listen("unix", t.TempDir()+"/s")
	if err != nil {
		t.Fatal(err)
	}
	unbound, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	var log bytes.Buffer
	files := []*os.File{
		pass(t, conn.(*net.TCPConn)), pass(t, connected.(*net.UDPConn)), pass(t, local.(*net.UnixListener)),
		os.NewFile(uintptr(unbound), "unbound"), r,
	}
	b, _ := newBook(t, Config{Inherited: files, Log: slog.New(slog.NewTextHandler(&log, nil))})
	for i, want := range []string{"it does not listen", "it is connected", "it is neither IPv4 nor IPv6", "it is not bound", "getsockopt"} {
		lines := strings.SplitAfter(log.String(), "\n")
		if !strings.Contains(lines[i], want) {
			t.Errorf("file %d: log %q, want %q", i, lines[i], want)
		}
		if files[i].Close() == nil {
			t.Errorf("file %d was not closed", i)
		}
	}
	if len(b.inherited) != 0 {
		t.Errorf("%v are to be used", b.inherited)
	}
}
