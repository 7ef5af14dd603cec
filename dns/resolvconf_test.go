package dns

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

func TestResolvConf(t *testing.T) {
	port53 := func(addrs ...string) (out []netip.AddrPort) {
		for _, a := range addrs {
			out = append(out, netip.AddrPortFrom(netip.MustParseAddr(a), 53))
		}
		return out
	}
	tests := []struct {
		name, file string
		want       ResolvConf
	}{
		{"empty", "", ResolvConf{Servers: port53("127.0.0.1")}},
		{"comments", "# nameserver 192.0.2.1\n; x\n\n  \n", ResolvConf{Servers: port53("127.0.0.1")}},
		{"order and repetitions", "nameserver 192.0.2.2\nnameserver 192.0.2.1\nnameserver 192.0.2.2\n", ResolvConf{Servers: port53("192.0.2.2", "192.0.2.1")}},
		{"zone", "nameserver fe80::1%eth0\nnameserver 2001:db8::53\n", ResolvConf{Servers: port53("fe80::1%eth0", "2001:db8::53")}},
		{"v4-mapped", "nameserver ::ffff:192.0.2.1", ResolvConf{Servers: port53("192.0.2.1")}},
		{"words behind", "nameserver 192.0.2.1 # the first\n", ResolvConf{Servers: port53("192.0.2.1")}},
		{"crlf and tabs", "nameserver\t192.0.2.1\r\nsearch\ta.example\r\n", ResolvConf{Servers: port53("192.0.2.1"), Search: []string{"a.example"}}},
		{"last of search and domain", "nameserver 192.0.2.1\nsearch a.example b.example\ndomain c.example d.example\n",
			ResolvConf{Servers: port53("192.0.2.1"), Search: []string{"c.example"}}},
		{"options", "nameserver 192.0.2.1\noptions ndots:3 timeout:2 attempts:4\noptions rotate use-vc edns0 trust-ad ndots:0\n",
			ResolvConf{Servers: port53("192.0.2.1"), NDots: 3, Timeout: 2 * time.Second, Attempts: 4, Rotate: true, UseTCP: true, EDNS0: true, Other: []string{"trust-ad", "ndots:0"}}},
		{"capped", "nameserver 192.0.2.1\noptions ndots:99 timeout:99 attempts:99\n",
			ResolvConf{Servers: port53("192.0.2.1"), NDots: 15, Timeout: 30 * time.Second, Attempts: 5}},
		{"nonsense", "nameserver\nnameserver dns.example.org\nnameserver 192.0.2.1:53\nfrobnicate on\nsortlist 192.0.2.0\nnameserver 192.0.2.1",
			ResolvConf{Servers: port53("192.0.2.1"), Ignored: []string{"nameserver", "nameserver dns.example.org", "nameserver 192.0.2.1:53", "frobnicate on"}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "resolv.conf")
			if err := os.WriteFile(path, []byte(tt.file), 0o600); err != nil {
				t.Fatal(err)
			}
			got, err := ReadResolvConf(path)
			if err != nil {
				t.Fatal(err)
			}
			comparable := cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })
			if diff := cmp.Diff(tt.want, got, comparable, cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("differs (-want +got):\n%s", diff)
			}
		})
	}
}

func TestResolvConfErrors(t *testing.T) {
	if _, err := ReadResolvConf(filepath.Join(t.TempDir(), "none")); !os.IsNotExist(unwrap(err)) {
		t.Errorf("missing file: %v", err)
	}
	if _, err := parseResolvConf(strings.NewReader(strings.Repeat("x", 1<<17))); err == nil {
		t.Error("a line of 128 KiB was read")
	}
}

func unwrap(err error) error {
	type wrapper interface{ Unwrap() error }
	if w, ok := err.(wrapper); ok {
		return w.Unwrap()
	}
	return err
}

func TestRotate(t *testing.T) {
	c, err := parseResolvConf(strings.NewReader("nameserver 192.0.2.1\nnameserver 192.0.2.2\noptions rotate\n"))
	if err != nil {
		t.Fatal(err)
	}
	next := c.Upstreams()
	for i := range 4 {
		if got := next(); len(got) != 2 || got[0] != c.Servers[i%2] || got[1] == got[0] {
			t.Errorf("call %d: %v", i, got)
		}
	}
}

func TestGuestResolvConf(t *testing.T) {
	c, err := parseResolvConf(strings.NewReader("nameserver 192.0.2.1\nsearch a.example b.example\noptions ndots:2 rotate trust-ad use-vc edns0 timeout:1 attempts:3\n"))
	if err != nil {
		t.Fatal(err)
	}
	want := "nameserver 192.168.65.1\nnameserver fdc4:f303:9324::1\nsearch a.example b.example\n" +
		"options ndots:2 attempts:3 timeout:1 use-vc edns0 trust-ad\n"
	_, got, _ := strings.Cut(string(c.Guest(gateway4, gateway6)), "\n")
	if got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
}
