package daemon

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The guest's networks are found among its routes: other devices' subnets and what is
// behind them, but none of ours, nor what leads nowhere.
func TestGuestNetworks(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if got := guestNetworks(dir); len(got) != 0 {
		t.Errorf("without files: %v", got)
	}
	write("route", "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"+
		"slipway0\t00000000\t0141A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"+
		"br0\t00000000\t090011AC\t0003\t0\t0\t9\t00000000\t0\t0\t0\n"+
		"br0\t0000010A\t090011AC\t0003\t0\t0\t0\t00F0FFFF\t0\t0\t0\n"+
		"br0\t000011AC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n"+
		"br1\t000011AC\t00000000\t0001\t0\t0\t7\t0000FFFF\t0\t0\t0\n"+
		"slipway0\t0041A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"+
		"*\t007100CB\t00000000\t0201\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"+
		"br0\t0x\t00000000\t0001\t0\t0\t0\t0000FFFF\nbr0\n\n")
	const zero = "00000000000000000000000000000000"
	var six strings.Builder
	for _, r := range [][]string{ // destination, length, flags, device
		{"20010db8000900000000000000000000", "40", "00200200", "lo"},
		{"fd000017000000000000000000000000", "40", "00000001", "br0"},
		{"fdc4f303932400000000000000000000", "40", "00000001", "slipway0"},
		{"fe800000000000000000000000000000", "40", "00000001", "br0"},
		{zero, "00", "00200200", "lo"},
		{"fd000017000000000000000000000000", "80", "00300001", "br0"},
		{"fd000017000000000000000000000001", "80", "80200001", "br0"},
		{"ff000000000000000000000000000000", "08", "00000001", "br0"},
		{"fd00", "40", "00000001", "br0"},
	} {
		fmt.Fprintf(&six, "%s %s %s 00 %s 00000100 00000003 00000000 %s %8s\n", r[0], r[1], zero, zero, r[2], r[3])
	}
	write("ipv6_route", six.String())
	if got, want := fmt.Sprint(guestNetworks(dir)), "[10.1.0.0/20 172.17.0.0/16 fd00:17::/64]"; got != want {
		t.Errorf("networks %s, want %s", got, want)
	}
}

func TestInsideHint(t *testing.T) {
	own4, own6 := netip.MustParseAddr("192.168.65.3"), netip.MustParseAddr("fdc4::3")
	var networks []netip.Prefix
	for i, want := range []string{
		"there are the engine's own 192.168.65.3 and fdc4::3, and its loopback",
		"there are the engine's own 192.168.65.3 and fdc4::3, its loopback, and its networks 172.17.0.0/16",
		"", "",
		"there are the engine's own 192.168.65.3 and fdc4::3, its loopback, and its networks 172.17.0.0/16, 172.18.0.0/16, 172.19.0.0/16, 172.20.0.0/16",
		"there are the engine's own 192.168.65.3 and fdc4::3, its loopback, and its networks 172.17.0.0/16, 172.18.0.0/16, 172.19.0.0/16, 172.20.0.0/16, 1 more",
	} {
		if got := insideHint(networks, own4, own6); want != "" && got != want {
			t.Errorf("with %d: %s", i, got)
		}
		networks = append(networks, netip.PrefixFrom(netip.AddrFrom4([4]byte{172, byte(17 + i)}), 16))
	}
}

func FuzzRoutes(f *testing.F) {
	f.Add("br0 0000010A 090011AC 0003 0 0 0 00F0FFFF 0 0 0")
	f.Add("fd000017000000000000000000000000 40 00 00 00 00000100 00000003 00000000 00000001 br0")
	f.Fuzz(func(t *testing.T, line string) {
		for _, parse := range []func([]string) (string, uint64, netip.Prefix){parseRoute4, parseRoute6} {
			if _, _, to := parse(strings.Fields(line)); to.IsValid() != (to.Bits() >= 0) {
				t.Errorf("%q is %v", line, to)
			}
		}
	})
}
