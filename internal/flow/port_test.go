package flow

import (
	"net/netip"
	"strings"
	"testing"
)

func TestParsePorts(t *testing.T) {
	tests := []struct {
		in   string
		want string // of all specs, or the error behind `port "...": `
	}{
		{"8080:80", "8080:80/tcp"},
		{"8080:80/tcp", "8080:80/tcp"},
		{"53:53/udp", "53:53/udp"},
		{"0:80", "0:80/tcp"},
		{"*:8080:80", "8080:80/tcp"},
		{"127.0.0.1:8080:80", "127.0.0.1:8080:80/tcp"},
		{"0.0.0.0:8080:80", "0.0.0.0:8080:80/tcp"},
		{"[::]:8080:80", "[::]:8080:80/tcp"},
		{"[::1]:8080:80/udp", "[::1]:8080:80/udp"},
		{"[::ffff:127.0.0.1]:8080:80", "127.0.0.1:8080:80/tcp"},
		{"8080:172.17.0.2:80", "8080:172.17.0.2:80/tcp"},
		{"8080:[2001:db8::2]:80", "8080:[2001:db8::2]:80/tcp"},
		{"192.0.2.9:8080:172.17.0.2:80/udp", "192.0.2.9:8080:172.17.0.2:80/udp"},
		{"[::1]:8080:[2001:db8::2]:80", "[::1]:8080:[2001:db8::2]:80/tcp"},
		{"8000-8002:9000-9002", "8000:9000/tcp 8001:9001/tcp 8002:9002/tcp"},
		{"[::1]:65534-65535:1-2/udp", "[::1]:65534:1/udp [::1]:65535:2/udp"},
		{"0:80-81", "0:80/tcp 0:81/tcp"},
		{"80-80:80", "80:80/tcp"},

		{"", `must be [HOSTIP:]HOSTPORT:[GUESTIP:]GUESTPORT[/tcp|udp]`},
		{"80", `must be [HOSTIP:]HOSTPORT:[GUESTIP:]GUESTPORT[/tcp|udp]; 0:80 is any port of the host`},
		{"8000-8010", `must be [HOSTIP:]HOSTPORT:[GUESTIP:]GUESTPORT[/tcp|udp]; 8000-8010:8000-8010 are the same ports of host and guest`},
		{"8000-8010/udp", `must be [HOSTIP:]HOSTPORT:[GUESTIP:]GUESTPORT[/tcp|udp]; 8000-8010:8000-8010 are the same ports of host and guest`},
		{"8000-", `must be [HOSTIP:]HOSTPORT:[GUESTIP:]GUESTPORT[/tcp|udp]`},
		{"127.0.0.1:80", `must be [HOSTIP:]HOSTPORT:[GUESTIP:]GUESTPORT[/tcp|udp]`},
		{"127.0.0.1:80:10.0.0.1:80:80", `must be [HOSTIP:]HOSTPORT:[GUESTIP:]GUESTPORT[/tcp|udp]`},
		{"80:1:10.0.0.1:80", `must be [HOSTIP:]HOSTPORT:[GUESTIP:]GUESTPORT[/tcp|udp]`},
		{"80:80/sctp", `protocol "sctp" is not tcp or udp`},
		{"80:80/", `protocol "" is not tcp or udp`},
		{"80:80/tcp/udp", `protocol "tcp/udp" is not tcp or udp`},
		{"80:80/TCP", `protocol "TCP" is not tcp or udp`},
		{"80:0", `"0" is not a port in 1..65535`},
		{"65536:80", `"65536" is not a port in 0..65535`},
		{"-1:80", `"" is not a port in 0..65535`},
		{"+80:80", `"+80" is not a port in 0..65535`},
		{"http:80", `"http" is not a port in 0..65535`},
		{":80", `"" is not a port in 0..65535`},
		{"80:", `"" is not a port in 1..65535`},
		{"80: 80", `" 80" is not a port in 1..65535`},
		{"81-80:81-80", `"81-80" is no range of ports`},
		{"0-1:80-81", `"0-1" is no range of ports`},
		{"80-81:80", `80-81 and 80 are of different length`},
		{"80:80-81", `80 and 80-81 are of different length`},
		{"1-2-3:1-2-3", `"2-3" is not a port in 0..65535`},
		{"8080:0.0.0.0:80", "0.0.0.0 is no address of a guest: leave it out for the engine's own"},
		{"8080:[::]:80", ":: is no address of a guest: leave it out for the engine's own"},
		{"127.0.0:80:80", `"127.0.0" is not an IP address, IPv6 in brackets`},
		{"[127.0.0.1]:80:80", `"[127.0.0.1]" is not an IP address, IPv6 in brackets`},
		{"[fe80::1%eth0]:80:80", `"[fe80::1%eth0]" is not an IP address, IPv6 in brackets`},
		{"80:81:82", `"81" is not an IP address, IPv6 in brackets`},
		{"[::1:80:80", `brackets do not match`},
		{"]80[:80:80", `"]80[" is not an IP address, IPv6 in brackets`},
		{"localhost:80:80", `"localhost" is neither an IP address nor a port`},
		{"localhost:80:10.0.0.1:80", `"localhost" is neither an IP address nor a port`},
		{"::1:80:80", `must be [HOSTIP:]HOSTPORT:[GUESTIP:]GUESTPORT[/tcp|udp], IPv6 addresses in brackets`},
	}
	for _, tt := range tests {
		specs, err := ParsePorts(tt.in)
		var words []string
		for _, s := range specs {
			words = append(words, s.String())
		}
		got, want := strings.Join(words, " "), tt.want
		if err != nil {
			got = err.Error()
		}
		if specs == nil {
			want = `port "` + tt.in + `": ` + want
		}
		if got != want || (err == nil) == (specs == nil) {
			t.Errorf("ParsePorts(%q) = %s\n want %s", tt.in, got, want)
		}
	}
}

func TestParseAllPorts(t *testing.T) {
	specs, err := ParsePorts("1-65535:1-65535/udp")
	if err != nil || len(specs) != 65535 {
		t.Fatalf("%d specs, %v", len(specs), err)
	}
	last := PortSpec{Proto: UDP, Host: netip.AddrPortFrom(netip.Addr{}, 65535), Guest: netip.AddrPortFrom(netip.Addr{}, 65535)}
	if specs[65534] != last {
		t.Errorf("last is %+v, want %+v", specs[65534], last)
	}
}

func TestPortSpecString(t *testing.T) {
	s := PortSpec{Proto: TCP, Host: netip.MustParseAddrPort("127.0.0.1:8080")}
	if got := s.String(); got != "127.0.0.1:8080:8080/tcp" {
		t.Errorf("without a guest port: %s", got)
	}
}

func FuzzParsePorts(f *testing.F) {
	for _, s := range []string{"8080:80", "[::1]:8000-8009:[2001:db8::2]:9000-9009/udp", "0:1-3", "*:80:80", "192.0.2.9:80:172.17.0.2:80/tcp"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, in string) {
		specs, err := ParsePorts(in)
		if err != nil {
			if specs != nil || strings.ContainsAny(err.Error(), "\n\r\x1b") {
				t.Fatalf("ParsePorts(%q) = %v, %v", in, specs, err)
			}
			return
		}
		if len(specs) == 0 {
			t.Fatalf("ParsePorts(%q) is nothing", in)
		}
		for _, s := range specs[max(0, len(specs)-3):] {
			if again, err := ParsePorts(s.String()); err != nil || len(again) != 1 || again[0] != s {
				t.Fatalf("ParsePorts(%q) has %+v, whose String %q is %v, %v", in, s, s, again, err)
			}
		}
	})
}
