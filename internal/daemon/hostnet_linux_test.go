package daemon

import (
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func prefixes(list ...string) (ps []netip.Prefix) {
	for _, s := range list {
		ps = append(ps, netip.MustParsePrefix(s))
	}
	return ps
}

func TestHostNetAdd(t *testing.T) {
	tests := []struct {
		name   string
		routes []string
		v4, v6 bool
		mirror []string
	}{
		{"nothing", nil, false, false, nil},
		{"defaults", []string{"0.0.0.0/0", "::/0"}, true, true, nil},
		{"a VPN's two halves", []string{"0.0.0.0/1", "128.0.0.0/1", "2000::/3"}, true, true, nil},
		{"a VPN's networks", []string{"10.0.0.0/8", "203.0.113.5/32", "fd00:1::/48"}, false, false, []string{"10.0.0.0/8", "203.0.113.5/32", "fd00:1::/48"}},
		{"what stays on the host", []string{"127.0.0.0/8", "169.254.0.0/16", "fe80::/64", "ff00::/8", "::1/128"}, false, false, nil},
		{"our own subnet", []string{"192.168.65.0/24", "192.168.0.0/16"}, false, false, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var h hostNet
			for _, p := range prefixes(tt.routes...) {
				h.add(p)
			}
			got, left := h.mirror(netip.MustParsePrefix("192.168.65.0/24"))
			if h.Default4 != tt.v4 || h.Default6 != tt.v6 || !slices.Equal(got, prefixes(tt.mirror...)) || left != 0 {
				t.Errorf("default %v %v, mirror %v, left %d", h.Default4, h.Default6, got, left)
			}
		})
	}
}

func TestMirrorLimit(t *testing.T) {
	var h hostNet
	for i := range maxMirrored + 7 {
		h.add(netip.PrefixFrom(netip.AddrFrom4([4]byte{100, byte(i >> 8), byte(i), 0}), 24))
	}
	if got, left := h.mirror(); len(got) != maxMirrored || left != 7 {
		t.Errorf("%d routes, %d left", len(got), left)
	}
}

func TestFreeSubnet(t *testing.T) {
	tests := []struct {
		name, want, got, overlap string
		routes                   []string
	}{
		{"free", "192.168.65.0/24", "192.168.65.0/24", "invalid Prefix", []string{"10.0.0.0/8"}},
		{"same", "192.168.65.0/24", "192.168.165.0/24", "192.168.65.0/24", []string{"192.168.65.0/24"}},
		{"inside a VPN's", "192.168.65.0/24", "10.165.65.0/24", "192.168.0.0/16", []string{"192.168.0.0/16", "172.16.0.0/12"}},
		{"all private", "192.168.65.0/24", "198.18.65.0/24", "192.168.0.0/16", []string{"192.168.0.0/16", "172.16.0.0/12", "10.0.0.0/8"}},
		{"v6", "fdc4:f303:9324::/64", "fdc4:f303:9325::/64", "fdc4:f303:9324::/64", []string{"fdc4:f303:9324::/64"}},
		{"nothing free", "fdc4:f303:9324::/64", "fdc4:f303:9324::/64", "fc00::/7", []string{"fc00::/7"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			h := hostNet{Routes: prefixes(tt.routes...)}
			got, overlap := h.freeSubnet(netip.MustParsePrefix(tt.want))
			if got.String() != tt.got || overlap.String() != tt.overlap {
				t.Errorf("got %v, overlap %v", got, overlap)
			}
		})
	}
}

func TestDestination(t *testing.T) {
	_, v4, _ := net.ParseCIDR("0.0.0.0/0")
	tests := []struct {
		route  netlink.Route
		family int
		want   string
	}{
		{netlink.Route{}, unix.AF_INET, "0.0.0.0/0"},
		{netlink.Route{}, unix.AF_INET6, "::/0"},
		{netlink.Route{Dst: v4}, unix.AF_INET, "0.0.0.0/0"},
		{netlink.Route{Dst: &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}}, unix.AF_INET, "0.0.0.0/0"},
		{netlink.Route{Dst: &net.IPNet{IP: net.IPv4(10, 1, 2, 3), Mask: net.CIDRMask(8, 32)}}, unix.AF_INET, "10.0.0.0/8"},
	}
	for _, tt := range tests {
		if got := destination(tt.route, tt.family); got.String() != tt.want {
			t.Errorf("%v = %v, want %v", tt.route.Dst, got, tt.want)
		}
	}
}

// The host's own table can be read; what is in it is the machine's business.
func TestReadHostNet(t *testing.T) {
	h, err := readHostNet()
	if err != nil {
		t.Fatal(err)
	}
	if !slices.IsSortedFunc(h.Routes, func(a, b netip.Prefix) int { return a.Addr().Compare(b.Addr()) }) {
		t.Errorf("not sorted: %v", h.Routes)
	}
}
