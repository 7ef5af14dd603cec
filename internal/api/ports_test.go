package api

import (
	"encoding/json"
	"net/http"
	"net/netip"
	"strings"
	"testing"

	"github.com/slipway-net/slipway/internal/flow"
)

func addrPort(s string) netip.AddrPort {
	host, port, _ := strings.Cut(s, "|")
	a, _ := netip.ParseAddr(host) // empty: the zero Addr
	ap := netip.MustParseAddrPort("0.0.0.0:" + port)
	return netip.AddrPortFrom(a, ap.Port())
}

func TestReadSpec(t *testing.T) {
	tests := []struct {
		body        string
		proto       flow.Proto
		host, guest string // address|port
		behind      string
	}{
		{`{"proto":"tcp","parentPort":8080,"childPort":80}`, flow.TCP, "|8080", "|80", ""},
		{`{"proto":"tcp","parentPort":8080}`, flow.TCP, "|8080", "|0", ""},
		{`{"proto":"tcp","parentPort":0,"childPort":80}`, flow.TCP, "|0", "|80", ""},
		{`{"proto":"udp","parentIP":"127.0.0.1","parentPort":53,"childIP":"172.17.0.2","childPort":53}`, flow.UDP, "127.0.0.1|53", "172.17.0.2|53", ""},
		{`{"proto":"tcp4","parentPort":1,"childPort":1}`, flow.TCP, "0.0.0.0|1", "|1", ""},
		{`{"proto":"tcp6","parentPort":1,"childPort":1}`, flow.TCP, "::|1", "|1", ""},
		{`{"proto":"udp6","parentIP":"::1","parentPort":1,"childIP":"127.0.0.1","childPort":1}`, flow.UDP, "::1|1", "127.0.0.1|1", ""},
		{`{"proto":"udp4","parentIP":"::ffff:192.0.2.1","parentPort":65535,"childPort":65535}`, flow.UDP, "192.0.2.1|65535", "|65535", ""},
		{`{"proto":"tcp","parentIP":"192.0.2.1","parentPort":80,"behind":"[fd00::2]:8080"}`, flow.TCP, "192.0.2.1|80", "|0", "fd00::2|8080"},
		{` {"proto":"tcp","parentPort":80,"later":{"a":[1]},"parentIP":null} ` + "\n", flow.TCP, "|80", "|0", ""},
	}
	for _, tt := range tests {
		got, err := readSpec([]byte(tt.body))
		want := flow.PortSpec{Proto: tt.proto, Host: addrPort(tt.host), Guest: addrPort(tt.guest)}
		if tt.behind != "" {
			want.Behind = addrPort(tt.behind)
		}
		if err != nil || got != want {
			t.Errorf("%s = %+v, %v; want %+v", tt.body, got, err, want)
		}
	}
	s, err := readSpec([]byte(`{"proto":"tcp","parentPort":80,"sourceIP":"gateway","proxyProtocol":true}`))
	if err != nil || s.Source != flow.SourceGateway || !s.ProxyProtocol {
		t.Errorf("%+v, %v", s, err)
	}
}

// badSpecs are bodies of requests and what their errors say.
var badSpecs = map[string]string{
	``:                                "read request: unexpected end",
	`{`:                               "read request: unexpected end",
	`null`:                            `proto "": must be one of tcp, tcp4`,
	`[]`:                              "read request: array where an object belongs",
	`"tcp"`:                           "read request: string where an object belongs",
	`{}`:                              `proto "": must be one of`,
	`{"proto":"tcp","parentPort":1}}`: "read request: invalid character",
	`{"proto":"tcp","parentPort":1}{"proto":"tcp"}`:    "read request: invalid character",
	`{"proto":"sctp","parentPort":1,"childPort":1}`:    `proto "sctp": must be one of`,
	`{"proto":"TCP","parentPort":1,"childPort":1}`:     `proto "TCP"`,
	`{"proto":7,"parentPort":1,"childPort":1}`:         "proto: number where a string belongs",
	`{"proto":"tcp","parentPort":"80","childPort":1}`:  "parentPort: string where a whole number belongs",
	`{"proto":"tcp","parentPort":80.5,"childPort":1}`:  "parentPort: number where a whole number belongs",
	`{"proto":"tcp","parentPort":1e99,"childPort":1}`:  "parentPort: number where",
	`{"proto":"tcp","parentPort":65536,"childPort":1}`: "parentPort 65536: must be in 0..65535",
	`{"proto":"tcp","parentPort":-1,"childPort":1}`:    "parentPort -1: must be in 0..65535",
	`{"proto":"tcp","parentPort":1,"childPort":70000}`: "childPort 70000: must be in 1..65535",
	`{"proto":"tcp","parentPort":1,"childPort":-7}`:    "childPort -7: must be in 1..65535",
	`{"proto":"tcp"}`: "childPort 0: must be in 1..65535",
	`{"proto":"tcp","parentIP":"localhost","parentPort":1}`:                 `parentIP "localhost": is not an IP address`,
	`{"proto":"tcp","parentIP":"fe80::1%eth0","parentPort":1}`:              "is not an IP address",
	`{"proto":"tcp","parentIP":"a\nb","parentPort":1}`:                      `parentIP "a\nb": is not`,
	`{"proto":"tcp6","parentIP":"127.0.0.1","parentPort":1}`:                "parentIP 127.0.0.1: is not of the family of proto tcp6",
	`{"proto":"udp4","parentIP":"::1","parentPort":1}`:                      "parentIP ::1: is not of the family of proto udp4",
	`{"proto":"tcp","parentPort":1,"childIP":"0.0.0.0"}`:                    "childIP 0.0.0.0: is no address of a guest",
	`{"proto":"tcp","parentPort":1,"childIP":"ff02::1"}`:                    "childIP ff02::1: is no address of a guest",
	`{"proto":"tcp","parentPort":1,"childIP":"web"}`:                        `childIP "web": is not an IP address`,
	`{"proto":"tcp","parentPort":1,"behind":"172.17.0.2"}`:                  `behind "172.17.0.2": must be an address and a port`,
	`{"proto":"tcp","parentPort":1,"behind":"172.17.0.2:0"}`:                `behind "172.17.0.2:0"`,
	`{"proto":"tcp","parentPort":1,"behind":"[::]:5"}`:                      `behind "[::]:5"`,
	`{"proto":"tcp","parentPort":1,"sourceIP":"mine"}`:                      `sourceIP "mine": must be preserve or gateway`,
	`{"proto":"udp","parentPort":1,"proxyProtocol":true}`:                   "proxyProtocol: is for tcp only",
	`{"proto":"tcp","parentPort":1,"proxyProtocol":"yes"}`:                  "proxyProtocol: string where true or false belongs",
	`{"proto":"` + strings.Repeat("x", 10000) + `"}`:                        `xxx"...: must be`,
	`{"proto":"tcp","parentPort":1,"x":` + strings.Repeat("[", 20000) + `}`: "exceeded max depth",
}

func TestReadSpecRefuses(t *testing.T) {
	for body, want := range badSpecs {
		s, err := readSpec([]byte(body))
		e := asError(err)
		if err == nil || !strings.Contains(e.Message, want) || e.Status != http.StatusBadRequest {
			t.Errorf("%.100s = %+v, %d %v; want %q", body, s, e.Status, err, want)
		}
		if len(e.Message) > 300 || strings.Contains(e.Message, "\n") {
			t.Errorf("%.100s: not one short line: %q", body, e.Message)
		}
	}
}

// What is read can be written and read again, and is the same.
func FuzzReadSpec(f *testing.F) {
	for body := range badSpecs {
		f.Add([]byte(body))
	}
	f.Add([]byte(`{"proto":"udp6","parentIP":"2001:db8::1","parentPort":53,"childIP":"127.0.0.1","childPort":54,"behind":"[fd00::2]:55","sourceIP":"preserve"}`))
	f.Add([]byte(`{"proto":"tcp4","childPort":80,"proxyProtocol":true}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		s, err := readSpec(body)
		if err != nil {
			if e := asError(err); e.Status != http.StatusBadRequest || strings.Contains(e.Message, "\n") {
				t.Errorf("error %+v", e)
			}
			return
		}
		b, err := json.Marshal(SpecOf(s))
		if err != nil {
			t.Fatal(err)
		}
		if again, err := readSpec(b); err != nil || again != s {
			t.Errorf("%s = %+v, %v; want %+v", b, again, err, s)
		}
	})
}

func TestReadGuestRequest(t *testing.T) {
	const spec = `{"proto":"tcp","parentPort":80}`
	tests := []struct {
		line     string
		withdraw uint64
		want     string // of the error
	}{
		{`{"publish":` + spec + `}`, 0, ""},
		{`{"withdraw":7}` + "\r", 7, ""},
		{`{"withdraw":18446744073709551615}`, 1<<64 - 1, ""},
		{``, 0, "read request: unexpected end"},
		{`{}`, 0, `must be {"publish": SPEC} or {"withdraw": ID}`},
		{`{"list":true}`, 0, "must be"},
		{`{"withdraw":0}`, 0, "must be"},
		{`{"withdraw":-1}`, 0, "withdraw: number where a whole number belongs"},
		{`{"withdraw":"7"}`, 0, "withdraw: string where a whole number belongs"},
		{`{"withdraw":7,"publish":` + spec + `}`, 0, "must be"},
		{`{"publish":null}`, 0, "proto"},
		{`{"publish":[]}`, 0, "array where an object belongs"},
		{`{"publish":` + spec + `} x`, 0, "invalid character"},
		{`GET / HTTP/1.1`, 0, "invalid character"},
	}
	for _, tt := range tests {
		s, id, err := readGuestRequest([]byte(tt.line))
		if tt.want != "" {
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%s = %v; want %q", tt.line, err, tt.want)
			}
			continue
		}
		if err != nil || id != tt.withdraw || id == 0 && s.Host.Port() != 80 {
			t.Errorf("%s = %+v, %d, %v", tt.line, s, id, err)
		}
	}
}

func FuzzReadGuestRequest(f *testing.F) {
	f.Add([]byte(`{"withdraw":7}`))
	f.Add([]byte(`{"withdraw":7,"publish":{}}`))
	f.Add([]byte(`{"publish":{"proto":"tcp","parentPort":80,"behind":"172.17.0.2:80"}}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		s, id, err := readGuestRequest(line)
		if err != nil {
			if e := asError(err); e.Status != http.StatusBadRequest || strings.Contains(e.Message, "\n") {
				t.Errorf("error %+v", e)
			}
			return
		}
		if (id == 0) != (s.Proto == flow.TCP || s.Proto == flow.UDP) {
			t.Errorf("%q is %d and %+v", line, id, s)
		}
	})
}
