package dockerproxy

import (
	"io"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/slipway-net/slipway/internal/flow"
)

func TestParse(t *testing.T) {
	container := []string{"-container-ip", "172.17.0.2", "-container-port", "80"}
	tests := []struct {
		name string
		args []string
		want options
		err  string // part of the error
	}{
		{"docker_20", slices.Concat([]string{"-proto", "tcp", "-host-ip", "0.0.0.0", "-host-port", "8080"}, container),
			options{proto: flow.TCP, host: ap("0.0.0.0:8080"), container: ap("172.17.0.2:80")}, ""},
		{"docker_28", slices.Concat([]string{"-proto", "udp", "-host-ip", "::", "-host-port", "53"}, container, []string{"-use-listen-fd"}),
			options{proto: flow.UDP, host: ap("[::]:53"), container: ap("172.17.0.2:80"), inherited: true}, ""},
		{"ipv6_container", []string{"-proto=tcp", "-host-ip=::1", "-host-port=65535", "-container-ip=fd00::2", "-container-port=1"},
			options{proto: flow.TCP, host: ap("[::1]:65535"), container: ap("[fd00::2]:1")}, ""},
		{"mapped_address", []string{"-host-ip", "::ffff:127.0.0.1", "-host-port", "1", "-container-ip", "::ffff:172.17.0.2", "-container-port", "80"},
			options{proto: flow.TCP, host: ap("127.0.0.1:1"), container: ap("172.17.0.2:80")}, ""},
		{"version", []string{"-v"}, options{version: true}, ""},
		{"long_version", []string{"--version"}, options{version: true}, ""},
		{"sctp", slices.Concat([]string{"-proto", "sctp", "-host-port", "1"}, container), options{}, "sctp cannot be published"},
		{"other_protocol", slices.Concat([]string{"-proto", "icmp", "-host-port", "1"}, container), options{}, `protocol "icmp" cannot be published`},
		{"no_host_port", container, options{}, "-host-port is missing"},
		{"port_too_high", slices.Concat([]string{"-host-port", "65536"}, container), options{}, "-host-port 65536"},
		{"no_container", []string{"-host-port", "1"}, options{}, "-container-ip is missing"},
		{"unspecified_container", []string{"-host-port", "1", "-container-ip", "0.0.0.0", "-container-port", "1"}, options{}, "-container-ip is missing"},
		{"no_container_port", []string{"-host-port", "1", "-container-ip", "172.17.0.2"}, options{}, "-container-port is missing"},
		{"no_address", slices.Concat([]string{"-host-ip", "web", "-host-port", "1"}, container), options{}, "host-ip"},
		{"unknown_flag", []string{"-stdin"}, options{}, "-stdin"},
		{"too_much", slices.Concat([]string{"-host-port", "1"}, container, []string{"more"}), options{}, `"more" is too much`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := parse(tt.args, io.Discard)
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Errorf("parse(%q): error %v, want one with %q", tt.args, err, tt.err)
				}
				return
			}
			if err != nil || got != tt.want {
				t.Errorf("parse(%q) = %+v, %v, want %+v", tt.args, got, err, tt.want)
			}
		})
	}
}

// FuzzParse: what parse takes can be published.
func FuzzParse(f *testing.F) {
	f.Add("-proto\ntcp\n-host-ip\n0.0.0.0\n-host-port\n8080\n-container-ip\n172.17.0.2\n-container-port\n80\n-use-listen-fd")
	f.Add("-proto\nsctp\n-host-ip\n::\n-host-port\n1\n-container-ip\nfe80::1%eth0\n-container-port\n80")
	f.Add("-v")
	f.Fuzz(func(t *testing.T, line string) {
		o, err := parse(strings.Split(line, "\n"), io.Discard)
		if err != nil || o.version {
			return
		}
		s := o.spec()
		if s.Proto != flow.TCP && s.Proto != flow.UDP || !s.Host.IsValid() || s.Host.Port() == 0 || !s.Behind.IsValid() || s.Behind.Port() == 0 {
			t.Errorf("%q asks for %+v", line, s)
		}
	})
}

func ap(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }
