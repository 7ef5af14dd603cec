package dns

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

const (
	serverPort = 53

	// maxResolvConf is far beyond any real resolv.conf, in bytes.
	maxResolvConf = 1 << 20

	// What the C library makes of higher numbers (resolv.conf(5)).
	maxNDots    = 15
	maxAttempts = 5
	maxTimeout  = 30 * time.Second
)

// ResolvConf is what a resolv.conf(5) says. Zero numbers stand for options that
// are not there.
type ResolvConf struct {
	Servers  []netip.AddrPort // in order, without repetitions; port 53
	Search   []string         // search domains as written
	NDots    int              // options ndots:N, at most 15
	Attempts int              // options attempts:N, at most 5
	Timeout  time.Duration    // options timeout:N, whole seconds, at most 30 s
	Rotate   bool             // options rotate: spread the queries over Servers
	UseTCP   bool             // options use-vc: ask over TCP only
	EDNS0    bool             // options edns0
	Other    []string         // options that we do not know, as written

	// Ignored are the lines that mean nothing to us, for a log: "nameserver"
	// without an address, for one.
	Ignored []string
}

// ReadResolvConf reads the file at path. A file without a name server means the
// host's own, 127.0.0.1, as the C library has it.
func ReadResolvConf(path string) (ResolvConf, error) {
	f, err := os.Open(path)
	if err != nil {
		return ResolvConf{}, fmt.Errorf("read resolv.conf: %w", err)
	}
	defer f.Close()
	c, err := parseResolvConf(f)
	if err != nil {
		return ResolvConf{}, fmt.Errorf("read resolv.conf on %s: %w", path, err)
	}
	return c, nil
}

func parseResolvConf(r io.Reader) (ResolvConf, error) {
	var c ResolvConf
	lines := bufio.NewScanner(io.LimitReader(r, maxResolvConf))
	for lines.Scan() {
		line := lines.Text()
		words := strings.Fields(line)
		if len(words) == 0 || line[0] == '#' || line[0] == ';' {
			continue
		}
		if !c.apply(words[0], words[1:]) {
			c.Ignored = append(c.Ignored, strings.TrimSpace(line))
		}
	}
	if err := lines.Err(); err != nil {
		return ResolvConf{}, err
	}
	if len(c.Servers) == 0 {
		c.Servers = []netip.AddrPort{netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), serverPort)}
	}
	return c, nil
}

// apply takes one line and reports whether it means something. Words behind what
// a line needs are ignored, as they are by the C library.
func (c *ResolvConf) apply(key string, words []string) bool {
	if len(words) == 0 {
		return false
	}
	switch key {
	case "nameserver":
		a, err := netip.ParseAddr(words[0])
		if err != nil {
			return false
		}
		server := netip.AddrPortFrom(a.Unmap(), serverPort)
		if !slices.Contains(c.Servers, server) {
			c.Servers = append(c.Servers, server)
		}
	case "domain": // of domain and search the last one counts
		c.Search = words[:1]
	case "search":
		c.Search = words
	case "options":
		for _, w := range words {
			if !c.option(w) {
				c.Other = append(c.Other, w)
			}
		}
	case "sortlist":
	default:
		return false
	}
	return true
}

// option takes one option and reports whether we know it.
func (c *ResolvConf) option(word string) bool {
	name, value, hasValue := strings.Cut(word, ":")
	n, err := strconv.Atoi(value)
	isNumber := hasValue && err == nil && n > 0 // ndots:0 is rare; it stays in Other
	switch {
	case name == "ndots" && isNumber:
		c.NDots = min(n, maxNDots)
	case name == "attempts" && isNumber:
		c.Attempts = min(n, maxAttempts)
	case name == "timeout" && isNumber:
		c.Timeout = time.Duration(min(n, int(maxTimeout/time.Second))) * time.Second
	case word == "rotate":
		c.Rotate = true
	case word == "use-vc":
		c.UseTCP = true
	case word == "edns0":
		c.EDNS0 = true
	default:
		return false
	}
	return true
}

// Upstreams returns a function for Config.Upstreams: the servers in order or,
// with Rotate, from the next one on at every call.
func (c ResolvConf) Upstreams() func() []netip.AddrPort {
	if !c.Rotate || len(c.Servers) < 2 {
		return func() []netip.AddrPort { return c.Servers }
	}
	var calls atomic.Uint64
	return func() []netip.AddrPort {
		first := int((calls.Add(1) - 1) % uint64(len(c.Servers)))
		return slices.Concat(c.Servers[first:], c.Servers[:first])
	}
}

// Guest returns the resolv.conf for a guest whose name servers are ours. Search
// domains and options are the guest's own resolver's business and kept, but for
// rotate: spreading queries is ours.
func (c ResolvConf) Guest(servers ...netip.Addr) []byte {
	var b bytes.Buffer
	b.WriteString("# Written by slipway. The host's resolv.conf is asked behind these addresses.\n")
	for _, a := range servers {
		fmt.Fprintf(&b, "nameserver %v\n", a)
	}
	if len(c.Search) > 0 {
		fmt.Fprintf(&b, "search %s\n", strings.Join(c.Search, " "))
	}
	if options := c.guestOptions(); len(options) > 0 {
		fmt.Fprintf(&b, "options %s\n", strings.Join(options, " "))
	}
	return b.Bytes()
}

func (c ResolvConf) guestOptions() []string {
	var o []string
	if c.NDots > 0 {
		o = append(o, "ndots:"+strconv.Itoa(c.NDots))
	}
	if c.Attempts > 0 {
		o = append(o, "attempts:"+strconv.Itoa(c.Attempts))
	}
	if c.Timeout > 0 {
		o = append(o, "timeout:"+strconv.Itoa(int(c.Timeout/time.Second)))
	}
	if c.UseTCP {
		o = append(o, "use-vc")
	}
	if c.EDNS0 {
		o = append(o, "edns0")
	}
	return append(o, c.Other...)
}
