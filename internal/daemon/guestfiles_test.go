package daemon

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var testAddrs = addrsOf(netip.MustParsePrefix("192.168.65.0/24"), netip.MustParsePrefix("fdc4:f303:9324::/64"))

func TestHostsFile(t *testing.T) {
	const ours = "# Added by slipway.\n" +
		"192.168.65.2 host.slipway.internal host.docker.internal host.containers.internal\n" +
		"fdc4:f303:9324::2 host.slipway.internal host.docker.internal host.containers.internal\n" +
		"192.168.65.1 gateway.slipway.internal gateway.docker.internal\n" +
		"fdc4:f303:9324::1 gateway.slipway.internal gateway.docker.internal\n"
	tests := []struct{ name, host, want string }{
		{"empty", "", "127.0.0.1 localhost\n::1 localhost\n" + ours},
		{"kept", "127.0.0.1 localhost # me\n10.1.2.3 intranet\n", "127.0.0.1 localhost # me\n10.1.2.3 intranet\n" + ours},
		{"Docker Desktop's", "127.0.0.1 localhost\n10.9.9.9 Host.Docker.Internal\n", "127.0.0.1 localhost\n" + ours},
		{"no last newline", "127.0.0.1 localhost", "127.0.0.1 localhost\n" + ours},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if d := cmp.Diff(tt.want, string(hostsFile([]byte(tt.host), testAddrs))); d != "" {
				t.Error(d)
			}
		})
	}
}
