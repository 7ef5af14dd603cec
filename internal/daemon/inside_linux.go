package daemon

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/slipway-net/slipway/forward"
	"github.com/slipway-net/slipway/internal/nsagent"
)

// notInside says why an address cannot be published.
type notInside struct {
	addr netip.Addr
	hint string
}

// Error is one line.
func (e *notInside) Error() string {
	return fmt.Sprintf("%v is no address of the engine or its networks", e.addr)
}

// Hint names the addresses that can be.
func (e *notInside) Hint() string { return e.hint }

// inside is the book's question whether the guest has an address.
func (d *doors) inside(a netip.Addr) error {
	e := d.ends
	ours := a == e.Gateway4 || a == e.Gateway6 || a == e.Host4 || a == e.Host6
	if p := d.Where(a); ours || a.IsLinkLocalUnicast() || p == forward.Outside || p == forward.Unrouted {
		proc := filepath.Join("/proc", strconv.Itoa(d.engine.agent.PID()), "net")
		return &notInside{a, insideHint(guestNetworks(proc), e.Guest4, e.Guest6)}
	}
	return nil
}

// maxNamed is how many networks a hint names.
const maxNamed = 4

// insideHint says which addresses a guest with these networks has.
func insideHint(networks []netip.Prefix, own ...netip.Addr) string {
	var ours []string
	for _, a := range own {
		if a.IsValid() {
			ours = append(ours, a.String())
		}
	}
	there := "there are the engine's own " + strings.Join(ours, " and ")
	if len(networks) == 0 {
		return there + ", and its loopback"
	}
	var words []string
	for _, p := range networks[:min(maxNamed, len(networks))] {
		words = append(words, p.String())
	}
	if more := len(networks) - maxNamed; more > 0 {
		words = append(words, fmt.Sprintf("%d more", more))
	}
	return fmt.Sprintf("%s, its loopback, and its networks %s", there, strings.Join(words, ", "))
}

// maxRoutes bounds what is read of a guest's routes, in bytes: some 500 of IPv4.
const maxRoutes = 64 << 10

// rtfAnycast is RTF_ANYCAST of linux/ipv6_route.h: the subnet router's address.
const rtfAnycast = 0x100000

// guestNetworks are what the routes below proc, a directory /proc/PID/net, lead to by other
// devices than ours. There are none where they cannot be read: it is for a hint.
func guestNetworks(proc string) (all []netip.Prefix) {
	for _, file := range []struct {
		name  string
		parse func(words []string) (device string, flags uint64, to netip.Prefix)
	}{{"route", parseRoute4}, {"ipv6_route", parseRoute6}} {
		for line := range strings.Lines(readStart(filepath.Join(proc, file.name))) {
			device, flags, to := file.parse(strings.Fields(line))
			const no = unix.RTF_REJECT | unix.RTF_LOCAL | rtfAnycast
			if device == nsagent.DefaultTUN || device == "lo" || flags&no != 0 || to.Bits() <= 0 ||
				to.Addr().IsMulticast() || to.Addr().IsLinkLocalUnicast() || slices.Contains(all, to) {
				continue
			}
			all = append(all, to)
		}
	}
	return all
}

// readStart reads the first maxRoutes bytes of a file.
func readStart(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	b, _ := io.ReadAll(io.LimitReader(f, maxRoutes)) // what there is will do
	return string(b)
}

// parseRoute4 takes a line of /proc/PID/net/route: device, destination, gateway, flags, three
// numbers, mask, and more. Addresses are the kernel's words, as numbers. What is no such line
// has the zero Prefix.
func parseRoute4(words []string) (device string, flags uint64, to netip.Prefix) {
	if len(words) < 8 {
		return "", 0, to
	}
	flags, err := strconv.ParseUint(words[3], 16, 64)
	a, okA := word4(words[1])
	mask, okMask := word4(words[7])
	if err != nil || !okA || !okMask {
		return "", 0, to
	}
	return words[0], flags, netip.PrefixFrom(a, ones(mask))
}

// word4 reads an address that is printed as one number.
func word4(s string) (netip.Addr, bool) {
	n, err := strconv.ParseUint(s, 16, 32)
	return netip.AddrFrom4([4]byte(binary.NativeEndian.AppendUint32(nil, uint32(n)))), err == nil
}

// ones is the length of a mask.
func ones(mask netip.Addr) (n int) {
	for b := mask.As4(); n < 32 && b[n/8]&(0x80>>(n%8)) != 0; {
		n++
	}
	return n
}

// parseRoute6 takes a line of /proc/PID/net/ipv6_route: destination, its length, source, its
// length, gateway, three numbers, flags, device.
func parseRoute6(words []string) (device string, flags uint64, to netip.Prefix) {
	if len(words) < 10 {
		return "", 0, to
	}
	b, err := hex.DecodeString(words[0])
	bits, errBits := strconv.ParseUint(words[1], 16, 8)
	flags, errFlags := strconv.ParseUint(words[8], 16, 64)
	a, ok := netip.AddrFromSlice(b)
	if err != nil || errBits != nil || errFlags != nil || !ok {
		return "", 0, to
	}
	return words[9], flags, netip.PrefixFrom(a, int(bits))
}
