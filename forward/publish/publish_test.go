package publish

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/slipway-net/slipway/internal/flow"
)

func TestAdd(t *testing.T) {
	tests := []struct {
		spec     string
		listens  []string
		guest    string // with the port that was asked for
		wildcard bool
	}{
		{"0:80", []string{"0.0.0.0", "::"}, "192.168.65.3:80", true},
		{"0:53/udp", []string{"0.0.0.0", "::"}, "192.168.65.3:53", true},
		{"0.0.0.0:0:80", []string{"0.0.0.0"}, "192.168.65.3:80", true},
		{"[::]:0:80", []string{"::"}, "[fdc4:f303:9324::3]:80", true},
		{"127.0.0.1:0:80", []string{"127.0.0.1"}, "192.168.65.3:80", false},
		{"127.9.8.7:0:80/udp", []string{"127.9.8.7"}, "192.168.65.3:80", false},
		{"[::1]:0:80", []string{"::1"}, "[fdc4:f303:9324::3]:80", false},
		{"[::ffff:127.0.0.1]:0:80", []string{"127.0.0.1"}, "192.168.65.3:80", false},
		{"[::1]:0:80/udp", []string{"::1"}, "[fdc4:f303:9324::3]:80", false},
		{"0:172.17.0.2:80", []string{"0.0.0.0", "::"}, "172.17.0.2:80", true},
		{"[::1]:0:172.17.0.2:80", []string{"::1"}, "172.17.0.2:80", false},
		{"0:127.0.0.1:80", []string{"0.0.0.0", "::"}, "127.0.0.1:80", true},
	}
	for _, tt := range tests {
		t.Run(tt.spec, func(t *testing.T) {
			b, _ := newBook(t, Config{})
			s := spec(t, tt.spec)
			p := add(t, b, "me", s)
			if diff := cmp.Diff(tt.listens, addrs(p)); diff != "" {
				t.Errorf("listens (-want +got)\n%s", diff)
			}
			port := p.Spec.Host.Port()
			for _, l := range p.Listens {
				if l.Port() != port || port == 0 {
					t.Errorf("Host is %v, but %v is listened on", p.Spec.Host, l)
				}
				if got := tells(t, s.Proto, l); got != fmt.Sprint(p.ID) {
					t.Errorf("%v tells %q, want %d", l, got, p.ID)
				}
			}
			if p.Spec.Guest.String() != tt.guest || p.Spec.Source != flow.SourcePreserve || p.Wildcard != tt.wildcard || p.Owner() != "me" || p.Since.IsZero() {
				t.Errorf("Add = %+v; want guest %s, wildcard %v", p, tt.guest, tt.wildcard)
			}
			if got, want := p.Asked().String(), at(s, port).String(); got != strings.Replace(want, "[::ffff:127.0.0.1]", "127.0.0.1", 1) {
				t.Errorf("Asked is %s, want %s", got, want)
			}
			b.Close()
			if got := tells(t, s.Proto, p.Listens[0]); got != "" {
				t.Errorf("%v tells %q after Close", p.Listens[0], got)
			}
			if _, err := b.Add("me", s); !errors.Is(err, net.ErrClosed) {
				t.Errorf("Add after Close: %v, want net.ErrClosed", err)
			}
		})
	}
}

func TestGuestPortIsTheHosts(t *testing.T) {
	b, _ := newBook(t, Config{})
	p := add(t, b, "me", flow.PortSpec{Proto: flow.TCP, Host: netip.AddrPortFrom(loop4, 0), Guest: netip.MustParseAddrPort("0.0.0.0:0")})
	if p.Spec.Guest != netip.AddrPortFrom(own4, p.Spec.Host.Port()) || p.Spec.Host.Port() == 0 {
		t.Errorf("guest %v for host %v", p.Spec.Guest, p.Spec.Host)
	}
}

func TestGuestFor(t *testing.T) {
	only := netip.MustParseAddrPort("172.17.0.2:80")
	port := netip.AddrPortFrom(own4, 80)
	tests := []struct {
		name     string
		p        *Port
		listener netip.Addr
		want     string
	}{
		{"v4", &Port{guest4: own4, guest6: own6}, any4, "192.168.65.3:80"},
		{"v6", &Port{guest4: own4, guest6: own6}, loop6, "[fdc4:f303:9324::3]:80"},
		{"mapped", &Port{guest4: own4, guest6: own6}, netip.MustParseAddr("::ffff:10.0.0.1"), "192.168.65.3:80"},
		{"dual", &Port{guest4: own4, guest6: own6, dual: true}, any6, "192.168.65.3:80"},
		{"guest without v6", &Port{guest4: own4}, any6, "192.168.65.3:80"},
		{"guest without v4", &Port{guest6: own6}, any4, "[fdc4:f303:9324::3]:80"},
		{"asked for", &Port{guest4: own4, guest6: own6, asked: flow.PortSpec{Guest: only}, Spec: flow.PortSpec{Guest: only}}, any6, "172.17.0.2:80"},
	}
	for _, tt := range tests {
		if !tt.p.Spec.Guest.IsValid() {
			tt.p.Spec.Guest = port
		}
		if got := tt.p.GuestFor(tt.listener).String(); got != tt.want {
			t.Errorf("%s: GuestFor(%v) = %s, want %s", tt.name, tt.listener, got, tt.want)
		}
	}
}

// A port of one address leads to that one.
func TestEither(t *testing.T) {
	container := netip.MustParseAddrPort("172.17.0.2:80")
	for _, c := range []struct {
		asked flow.PortSpec
		want  bool
	}{
		{flow.PortSpec{Guest: netip.AddrPortFrom(netip.Addr{}, 80)}, true},
		{flow.PortSpec{Guest: container}, false},
		{flow.PortSpec{Guest: netip.AddrPortFrom(own4, 80)}, false},
		{flow.PortSpec{Guest: netip.AddrPortFrom(netip.Addr{}, 80), Behind: container}, false},
	} {
		if got := (&Port{asked: c.asked}).Either(); got != c.want {
			t.Errorf("%+v: either family %v, want %v", c.asked, got, c.want)
		}
	}
}

func TestAddAgain(t *testing.T) {
	b, c := newBook(t, Config{})
	s := spec(t, "0:80")
	p := add(t, b, "me", s)
	real := at(s, p.Spec.Host.Port())
	gateway := real
	gateway.Source = flow.SourceGateway
	for _, again := range []flow.PortSpec{s, p.Spec, real} {
		if q := add(t, b, "me", again); q != p {
			t.Errorf("Add(%v) = port %d, want %d", again, q.ID, p.ID)
		}
	}
	if n := c.isOpen(); n != 2 {
		t.Errorf("%d sockets are carried, want 2", n)
	}
	for _, other := range []flow.PortSpec{spec(t, fmt.Sprintf("%d:81", p.Spec.Host.Port())), gateway} {
		var conflict *ConflictError
		if _, err := b.Add("me", other); !errors.As(err, &conflict) {
			t.Errorf("Add(%v): %v, want a conflict with what is there for another guest", other, err)
		}
	}
	header := real
	header.ProxyProtocol = true
	elsewhere := spec(t, fmt.Sprintf("%d:81", p.Spec.Host.Port()))
	elsewhere.Source = flow.SourceGateway
	for _, tt := range []struct {
		owner string
		asked flow.PortSpec
		want  string // the end of the error
	}{
		{"me", gateway, " of me, with the source_ip preserve"},
		{"me", header, " of me, without a PROXY protocol header"},
		{"me", elsewhere, " of me"},
		{"you", gateway, " of me"},
	} {
		if _, err := b.Add(tt.owner, tt.asked); err == nil || !strings.HasSuffix(err.Error(), tt.want) {
			t.Errorf("Add(%s, %+v): %v, want an end like %q", tt.owner, tt.asked, err, tt.want)
		}
	}
	if q := add(t, b, "you", s); q == p || q.Spec.Host == p.Spec.Host {
		t.Errorf("another owner's port 0 is %v, too", q.Spec.Host)
	}
}

func TestConflict(t *testing.T) {
	tests := []struct {
		first, second string // %d is the port
		where         string // in the error; "" for none
	}{
		{"%d:80", "%d:80", "0.0.0.0:%d/tcp"},
		{"%d:80", "%d:80/udp", ""},
		{"0.0.0.0:%d:80", "[::]:%d:80", ""},
		{"0.0.0.0:%d:80/udp", "[::]:%d:80/udp", ""},
		{"[::]:%d:80", "%d:80", "[::]:%d/tcp"},
		{"127.0.0.1:%d:80", "%d:80", "0.0.0.0:%d/tcp"},
		{"%d:80/udp", "127.0.0.1:%d:80/udp", "127.0.0.1:%d/udp"},
		{"127.0.0.1:%d:80", "127.0.0.2:%d:80", ""},
		{"127.0.0.1:%d:80", "[::1]:%d:80", ""},
		{"[::]:%d:80", "[::1]:%d:81", "[::1]:%d/tcp"},
	}
	for _, tt := range tests {
		t.Run(tt.first+" "+tt.second, func(t *testing.T) {
			b, _ := newBook(t, Config{})
			port := freePort(t)
			fill := func(s string) string { return strings.ReplaceAll(s, "%d", fmt.Sprint(port)) }
			p := add(t, b, "one", spec(t, fill(tt.first)))
			_, err := b.Add("two", spec(t, fill(tt.second)))
			if tt.where == "" {
				if err != nil {
					t.Errorf("error %v, want none", err)
				}
				return
			}
			want := fmt.Sprintf("publish %s: port %d is taken by the published port %v of one", fill(tt.where), port, spec(t, fill(tt.first)))
			var conflict *ConflictError
			if !errors.As(err, &conflict) || err.Error() != want || hint(err) == "" {
				t.Errorf("error %q (hint %q)\n want %q", err, hint(err), want)
			}
			if got := ids(b); !slices.Equal(got, []uint64{p.ID}) {
				t.Errorf("ports %v, want %d alone", got, p.ID)
			}
		})
	}
}

// Auto publish gives way to everybody, unless that is in vain, and nobody to auto publish.
func TestYields(t *testing.T) {
	b, c := newBook(t, Config{Yields: "auto"})
	port := freePort(t)
	fill := func(s string) flow.PortSpec { return spec(t, fmt.Sprintf(s, port)) }
	conflict := func(owner, s string) {
		t.Helper()
		var taken *ConflictError
		if _, err := b.Add(owner, fill(s)); !errors.As(err, &taken) {
			t.Errorf("Add(%s, "+s+"): %v, want a conflict", owner, port, err)
		}
	}
	add(t, b, "auto", fill("127.0.0.1:%d:80"))
	add(t, b, "auto", fill("127.0.0.2:%d:80"))
	conflict("auto", "0.0.0.0:%d:80")
	v6 := add(t, b, "one", fill("[::]:%d:80"))
	conflict("two", "%d:80")
	if n := len(b.List()); n != 3 {
		t.Errorf("%d ports, want 3: nobody gives way in vain", n)
	}
	p := add(t, b, "one", fill("0.0.0.0:%d:80"))
	if got := ids(b); !slices.Equal(got, []uint64{v6.ID, p.ID}) || c.isOpen() != 2 {
		t.Errorf("ports %v with %d sockets, want %d and %d", got, c.isOpen(), v6.ID, p.ID)
	}
	if got := tells(t, flow.TCP, p.Listens[0]); got != fmt.Sprint(p.ID) {
		t.Errorf("the port tells %q, want %d", got, p.ID)
	}
	conflict("auto", "127.0.0.1:%d:80")
	conflict("two", "127.0.0.1:%d:80")
}

// A port of somebody else's, in one of two families: nothing is left half-published.
func TestTakenInOneFamily(t *testing.T) {
	for _, addr := range []string{"127.0.0.1:0", "[::1]:0"} {
		ln, err := net.Listen("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		taken := ln.Addr().(*net.TCPAddr).AddrPort()
		b, c := newBook(t, Config{})
		_, err = b.Add("me", at(spec(t, "1:80"), taken.Port()))
		var conflict *ConflictError
		if !errors.As(err, &conflict) || conflict.Spec.Host.Addr().Is4() != taken.Addr().Is4() {
			t.Errorf("%v: error %v, want a conflict in that family", taken, err)
		}
		if c.isOpen() != 0 || len(b.List()) != 0 {
			t.Errorf("%d sockets, ports %v; want none", c.isOpen(), b.List())
		}
		network, other := "tcp6", any6
		if taken.Addr().Is6() {
			network, other = "tcp4", any4
		}
		again, err := net.Listen(network, netip.AddrPortFrom(other, taken.Port()).String())
		if err != nil {
			t.Fatalf("the other family's socket is still there: %v", err)
		}
		again.Close()
	}
}

// outside is what Config.Inside says of an address.
type outside struct{ netip.Addr }

func (o outside) Error() string { return fmt.Sprintf("%v is not in the engine's networks", o.Addr) }
func (o outside) Hint() string  { return "instead of " + o.String() }

func TestBadSpecs(t *testing.T) {
	b, c := newBook(t, Config{Inside: func(a netip.Addr) error {
		if a != netip.MustParseAddr("172.17.0.2") {
			return outside{a}
		}
		return nil
	}})
	tests := []struct {
		name string
		s    flow.PortSpec
		want string
	}{
		{"no protocol", flow.PortSpec{Host: netip.MustParseAddrPort("127.0.0.1:80")}, "publish 127.0.0.1:80/proto(0): only tcp and udp ports can be published"},
		{"ping", flow.PortSpec{Proto: flow.Ping}, "publish 0.0.0.0:0/ping: only tcp and udp ports can be published"},
		{"multicast host", spec(t, "224.0.0.251:5353:53/udp"), "publish 224.0.0.251:5353/udp: 224.0.0.251 is not an address of one machine"},
		{"broadcast host", spec(t, "255.255.255.255:67:67/udp"), "255.255.255.255 is not an address of one machine"},
		{"multicast guest", spec(t, "80:[ff02::1]:80"), "ff02::1 is not an address of one machine"},
		{"not of this host", spec(t, "192.0.2.9:0:80"), "publish 192.0.2.9:0/tcp: 192.0.2.9 is not an address of this host"},
		{"not of this host, v6", spec(t, "[2001:db8::9]:0:80/udp"), "publish [2001:db8::9]:0/udp: 2001:db8::9 is not an address of this host"},
		{"guest outside", spec(t, "0:172.30.0.9:80"), "publish 0.0.0.0:0/tcp: 172.30.0.9 is not in the engine's networks"},
		{"behind outside", flow.PortSpec{Proto: flow.TCP, Behind: netip.MustParseAddrPort("172.30.0.9:80")}, "172.30.0.9 is not in the engine's networks"},
		{"behind without port", flow.PortSpec{Proto: flow.TCP, Behind: netip.MustParseAddrPort("172.17.0.2:0")}, "172.17.0.2:0 is not an address and port of a container"},
		{"behind without address", flow.PortSpec{Proto: flow.TCP, Behind: netip.AddrPortFrom(netip.Addr{}, 80)}, "is not an address and port of a container"},
		{"source", flow.PortSpec{Proto: flow.TCP, Source: "mine"}, `source "mine" is not "preserve" or "gateway"`},
		{"PROXY protocol of UDP", flow.PortSpec{Proto: flow.UDP, ProxyProtocol: true}, "a PROXY protocol header needs tcp"},
	}
	for _, tt := range tests {
		_, err := b.Add("me", tt.s)
		var bad *SpecError
		if !errors.As(err, &bad) || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: error %q, want %q", tt.name, err, tt.want)
			continue
		}
		if got, want := bad.Hint(), "instead of 172.30.0.9"; (got == want) != strings.HasSuffix(tt.name, " outside") || got != want && got != "" {
			t.Errorf("%s: hint %q", tt.name, got)
		}
	}
	if c.isOpen() != 0 || len(b.List()) != 0 {
		t.Errorf("%d sockets, ports %v; want none", c.isOpen(), b.List())
	}
	for _, good := range []string{"0:172.17.0.2:80", "0:127.0.0.1:80", "0:[::1]:80", "0:192.168.65.3:81", "0:82"} {
		add(t, b, "me", spec(t, good))
	}
}

func TestPolicy(t *testing.T) {
	evens := func(port uint16) bool { return port%2 == 0 }
	tests := []struct {
		bind, spec string
		want       string // addresses, or the error
	}{
		{"", "80:80", "0.0.0.0 ::"},
		{BindAsAsked, "80:80", "0.0.0.0 ::"},
		{BindAsAsked, "192.0.2.9:80:80", "192.0.2.9"},
		{BindAsAsked, "0:80", "0.0.0.0 ::"},
		{BindAsAsked, "81:80", "publish 0.0.0.0:81/tcp: port 81 is not in publish_ports"},
		{BindAsAsked, "[::1]:81:80/udp", "publish [::1]:81/udp: port 81 is not in publish_ports"},
		{BindLoopbackDefault, "80:80", "127.0.0.1 ::1"},
		{BindLoopbackDefault, "0.0.0.0:80:80", "127.0.0.1"},
		{BindLoopbackDefault, "[::]:80:80", "::1"},
		{BindLoopbackDefault, "192.0.2.9:80:80", "192.0.2.9"},
		{BindLoopbackDefault, "0:80", "127.0.0.1 ::1"},
		{BindLoopbackOnly, "80:80", "127.0.0.1 ::1"},
		{BindLoopbackOnly, "[::]:80:80", "::1"},
		{BindLoopbackOnly, "127.1.2.3:80:80", "127.1.2.3"},
		{BindLoopbackOnly, "[::1]:80:80", "::1"},
		{BindLoopbackOnly, "192.0.2.9:80:80", "publish 192.0.2.9:80/tcp: publish_bind allows loopback addresses only"},
		{"misspelt", "192.0.2.9:80:80", "publish 192.0.2.9:80/tcp: publish_bind allows loopback addresses only"},
		{"misspelt", "80:80", "127.0.0.1 ::1"},
	}
	for _, tt := range tests {
		claims, err := rules{tt.bind, evens, ""}.claims(spec(t, tt.spec))
		var got []string
		for _, c := range claims {
			got = append(got, c.Addr().String())
		}
		if err != nil {
			var policy *PolicyError
			if !errors.As(err, &policy) || hint(err) == "" {
				t.Errorf("%s %s: error %#v, want a PolicyError with a hint", tt.bind, tt.spec, err)
			}
			got = []string{err.Error()}
		}
		if strings.Join(got, " ") != tt.want {
			t.Errorf("%s %s: %q, want %q", tt.bind, tt.spec, got, tt.want)
		}
	}
}

func TestUpdate(t *testing.T) {
	b, _ := newBook(t, Config{})
	p := add(t, b, "me", spec(t, "0:80"))
	b.Update(BindLoopbackOnly, func(uint16) bool { return false }, flow.SourceGateway)
	if q := add(t, b, "me", at(spec(t, "0:80"), p.Spec.Host.Port())); q != p {
		t.Errorf("what was there is port %d now, want %d", q.ID, p.ID)
	}
	if got := tells(t, flow.TCP, p.Listens[1]); got != fmt.Sprint(p.ID) {
		t.Errorf("%v tells %q, want %d", p.Listens[1], got, p.ID)
	}
	q := add(t, b, "me", spec(t, "0:81"))
	if diff := cmp.Diff([]string{"127.0.0.1", "::1"}, addrs(q)); diff != "" || q.Spec.Source != flow.SourceGateway || !q.Wildcard || q.Spec.Host.Addr().IsValid() {
		t.Errorf("new port %+v, listens (-want +got)\n%s", q, diff)
	}
	var policy *PolicyError
	if _, err := b.Add("me", spec(t, "8080:80")); !errors.As(err, &policy) {
		t.Errorf("a port that is not allowed: %v", err)
	}
}

func TestRemove(t *testing.T) {
	b, _ := newBook(t, Config{})
	p := add(t, b, "me", spec(t, "0:80"))
	q := add(t, b, "me", spec(t, "0:81"))
	if err := b.Remove(p.ID); err != nil {
		t.Fatal(err)
	}
	if got := tells(t, flow.TCP, p.Listens[0]); got != "" {
		t.Errorf("%v tells %q after Remove", p.Listens[0], got)
	}
	if got := tells(t, flow.TCP, q.Listens[0]); got != fmt.Sprint(q.ID) {
		t.Errorf("the other tells %q, want %d", got, q.ID)
	}
	for _, id := range []uint64{p.ID, 0, 1 << 60} {
		if err := b.Remove(id); !errors.Is(err, ErrNotFound) {
			t.Errorf("Remove(%d): %v, want ErrNotFound", id, err)
		}
	}
	again := add(t, b, "you", at(spec(t, "0:80"), p.Spec.Host.Port()))
	if again.ID == p.ID || again.ID == q.ID {
		t.Errorf("ID %d is used again", again.ID)
	}
}

func TestRemoveSpec(t *testing.T) {
	asked := spec(t, "0:80")
	asked.Source = flow.SourceGateway
	behind := spec(t, "127.0.0.1:0:80")
	behind.Behind = netip.MustParseAddrPort("172.17.0.2:80")
	tests := []struct {
		name string
		s    flow.PortSpec
		by   func(*Port) flow.PortSpec
		want bool
	}{
		{"as asked", asked, func(*Port) flow.PortSpec { return asked }, true},
		{"as answered", asked, func(p *Port) flow.PortSpec { return p.Spec }, true},
		{"without source", asked, func(*Port) flow.PortSpec { return spec(t, "0:80") }, true},
		{"by its real port", asked, func(p *Port) flow.PortSpec { return at(spec(t, "0:80"), p.Spec.Host.Port()) }, true},
		{"without what is behind", behind, func(p *Port) flow.PortSpec { return at(spec(t, "127.0.0.1:0:80"), p.Spec.Host.Port()) }, true},
		{"another guest port", asked, func(p *Port) flow.PortSpec { return at(spec(t, "0:81"), p.Spec.Host.Port()) }, false},
		{"another guest", asked, func(p *Port) flow.PortSpec { return at(spec(t, "0:172.17.0.2:80"), p.Spec.Host.Port()) }, false},
		{"another host address", asked, func(p *Port) flow.PortSpec { return at(spec(t, "0.0.0.0:0:80"), p.Spec.Host.Port()) }, false},
		{"another protocol", asked, func(p *Port) flow.PortSpec { return at(spec(t, "0:80/udp"), p.Spec.Host.Port()) }, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b, _ := newBook(t, Config{})
			p := add(t, b, "me", tt.s)
			if err := b.RemoveSpec("you", tt.by(p)); !errors.Is(err, ErrNotFound) {
				t.Errorf("for another owner: %v, want ErrNotFound", err)
			}
			err := b.RemoveSpec("me", tt.by(p))
			if tt.want && err != nil || !tt.want && !errors.Is(err, ErrNotFound) {
				t.Errorf("RemoveSpec(%v): %v; want it gone: %v", tt.by(p), err, tt.want)
			}
			if left := len(b.List()); left == 1 == tt.want {
				t.Errorf("%d ports are left", left)
			}
		})
	}
	b, _ := newBook(t, Config{})
	var bad *SpecError
	if err := b.RemoveSpec("me", flow.PortSpec{}); !errors.As(err, &bad) {
		t.Errorf("RemoveSpec of nothing: %v, want a SpecError", err)
	}
}

func TestHeld(t *testing.T) {
	b, _ := newBook(t, Config{})
	p := add(t, b, "one", spec(t, "127.0.0.1:0:80"))
	port := p.Spec.Host.Port()
	held := func(want bool, owner string, proto flow.Proto, port uint16) {
		t.Helper()
		if got := b.Held(owner, proto, port); got != want {
			t.Errorf("Held(%s, %v, %d) = %v", owner, proto, port, got)
		}
	}
	held(true, "two", flow.TCP, port)
	held(false, "one", flow.TCP, port)
	held(false, "two", flow.UDP, port)
	held(false, "two", flow.TCP, port^1)
	add(t, b, "two", at(spec(t, "127.0.0.2:1:80"), port))
	held(true, "one", flow.TCP, port)
	b.RemoveOwner("two")
	b.RemoveOwner("one")
	held(false, "two", flow.TCP, port)
}

func TestRemoveOwner(t *testing.T) {
	b, c := newBook(t, Config{})
	add(t, b, "me", spec(t, "0:80"))
	add(t, b, "me", spec(t, "0:53/udp"))
	p := add(t, b, "you", spec(t, "0:80"))
	b.RemoveOwner("me")
	b.RemoveOwner("nobody")
	if got := ids(b); !slices.Equal(got, []uint64{p.ID}) || c.isOpen() != 2 {
		t.Errorf("ports %v with %d sockets are left, want %d alone", got, c.isOpen(), p.ID)
	}
}

// Two owners who are one person may ask for the same port. It stays until both have given
// it up, and its owner is the first who has not.
func TestTogether(t *testing.T) {
	b, c := newBook(t, Config{Together: []string{"file", "hand"}})
	expect := func(after, owner string) {
		t.Helper()
		l := b.List()
		if owner == "" && len(l)+c.isOpen() != 0 || owner != "" && (len(l) != 1 || l[0].Owner() != owner) {
			t.Errorf("%s: ports %v with %d sockets, want one of %q", after, l, c.isOpen(), owner)
		}
	}
	p := add(t, b, "file", spec(t, "127.0.0.1:0:80"))
	s := at(spec(t, "127.0.0.1:1:80"), p.Spec.Host.Port())
	if again := add(t, b, "hand", s); again != p {
		t.Errorf("Add of another of them = %v, want %v", again, p)
	}
	add(t, b, "hand", p.Spec) // in the words that Add answered
	expect("both", "file")
	if b.Held("hand", flow.TCP, s.Host.Port()) || b.Held("file", flow.TCP, s.Host.Port()) {
		t.Error("what one has himself is held by somebody else")
	}

	var conflict *ConflictError
	for _, other := range []flow.PortSpec{at(spec(t, "1:80"), s.Host.Port()), at(spec(t, "127.0.0.1:1:81"), s.Host.Port())} {
		if _, err := b.Add("hand", other); !errors.As(err, &conflict) {
			t.Errorf("%v in another way: %v", other, err)
		}
	}
	if _, err := b.Add("you", s); !errors.As(err, &conflict) {
		t.Errorf("somebody else's: %v", err)
	}

	b.Reconcile("file", nil)
	expect("the file has given it up", "hand")
	b.Reconcile("file", []flow.PortSpec{s})
	expect("the file has it again", "hand")
	b.RemoveSpec("hand", s)
	expect("the hand has given it up", "file")
	b.Reconcile("file", []flow.PortSpec{s})
	expect("the file as before", "file")
	add(t, b, "hand", s)
	if err := b.Remove(p.ID); err != nil {
		t.Error(err)
	}
	expect("Remove", "")
	add(t, b, "hand", s)
	expect("again by hand", "hand")
	b.Close()
	expect("Close", "")
}

// Who withdraws while a port is being opened waits for it and withdraws it, too.
func TestRemoveWhileOpening(t *testing.T) {
	for name, remove := range map[string]func(*Book, flow.PortSpec){
		"owner": func(b *Book, _ flow.PortSpec) { b.RemoveOwner("me") },
		"spec":  func(b *Book, s flow.PortSpec) { b.RemoveSpec("me", s) },
		"all":   func(b *Book, _ flow.PortSpec) { b.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			hold := make(chan struct{})
			b, c := newBook(t, Config{Carrier: &teller{hold: hold}})
			s := spec(t, "0:80")
			var wg sync.WaitGroup
			wg.Go(func() { add(t, b, "me", s) })
			await(t, "the reservation", func() bool { return len(b.of("me")) == 1 })
			if len(b.List()) != 0 {
				t.Error("a port is listed before it listens")
			}
			removed := make(chan struct{})
			go func() { defer close(removed); remove(b, s) }()
			select {
			case <-removed:
				t.Error("removed while it was being opened")
			case <-time.After(20 * time.Millisecond):
			}
			close(hold)
			wg.Wait()
			<-removed
			if n := c.isOpen(); n != 0 || len(b.List()) != 0 {
				t.Errorf("%d sockets, ports %v; want none", n, b.List())
			}
		})
	}
}

// await polls until cond holds.
func await(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("no %s within %v", what, patience)
		}
	}
}

// Many who ask for one thing at a time get one port; another owner gets a conflict
// or, when the first has failed, the port.
func TestAddAtOnce(t *testing.T) {
	b, c := newBook(t, Config{})
	s := at(spec(t, "0:80"), freePort(t))
	got := make([]*Port, 64)
	var wg sync.WaitGroup
	for i := range got {
		wg.Go(func() { got[i] = add(t, b, "me", s) })
	}
	wg.Wait()
	for _, p := range got {
		if p != got[0] {
			t.Fatalf("ports %d and %d for one spec", p.ID, got[0].ID)
		}
	}
	if n := c.isOpen(); n != 2 {
		t.Errorf("%d sockets, want 2", n)
	}
}

func TestWaitsForOneThatFails(t *testing.T) {
	hold := make(chan struct{})
	b, _ := newBook(t, Config{Carrier: &teller{hold: hold, fail: func(p *Port) error {
		if p.Owner() == "one" {
			return errors.New("no room")
		}
		return nil
	}}})
	s := at(spec(t, "0:80"), freePort(t))
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := b.Add("one", s); err == nil || !strings.HasSuffix(err.Error(), "/tcp: no room") {
			t.Errorf("error %v, want the Carrier's", err)
		}
	})
	await(t, "the reservation", func() bool { return len(b.of("one")) == 1 })
	wg.Go(func() { add(t, b, "two", s) })
	close(hold)
	wg.Wait()
	if l := b.List(); len(l) != 1 || l[0].Owner() != "two" {
		t.Errorf("ports %v, want one of two", l)
	}
}

// The Carrier takes the first socket and not the second: both are closed.
func TestCarrierFails(t *testing.T) {
	n := 0
	b, c := newBook(t, Config{Carrier: &teller{fail: func(*Port) error {
		if n++; n == 2 {
			return errors.New("no room")
		}
		return nil
	}}})
	s := at(spec(t, "0:80"), freePort(t))
	if _, err := b.Add("me", s); err == nil || err.Error() != fmt.Sprintf("publish [::]:%d/tcp: no room", s.Host.Port()) {
		t.Errorf("error %v, want the Carrier's for the second socket", err)
	}
	if c.isOpen() != 0 || len(b.List()) != 0 {
		t.Errorf("%d sockets, ports %v; want none", c.isOpen(), b.List())
	}
	add(t, b, "you", s)
}

func TestReconcile(t *testing.T) {
	b, _ := newBook(t, Config{})
	list := func(specs ...string) (all []flow.PortSpec) {
		for _, s := range specs {
			all = append(all, spec(t, s))
		}
		return all
	}
	byGuest := func() map[uint16]*Port {
		all := make(map[uint16]*Port)
		for _, p := range b.List() {
			if p.Owner() == "me" {
				all[p.Spec.Guest.Port()] = p
			}
		}
		return all
	}
	yours := add(t, b, "you", spec(t, "127.0.0.1:0:80"))
	if errs := b.Reconcile("me", list("0:80", "0:81", "0:80", "0:82/udp")); errs != nil {
		t.Fatal(errs)
	}
	first := byGuest()
	if len(first) != 3 {
		t.Fatalf("ports %v, want 3", first)
	}

	moved := first[82].Spec.Host.Port() // to another guest port, on the same host port
	taken := yours.Spec.Host.Port()
	errs := b.Reconcile("me", append(list("0:80", fmt.Sprintf("%d:83/udp", moved), fmt.Sprintf("%d:84", taken), "192.0.2.9:0:85"),
		flow.PortSpec{}, first[81].Spec))
	if len(errs) != 3 {
		t.Errorf("errors %v, want 3: the one taken, the one not of this host, the empty one", errs)
	}
	second := byGuest()
	if len(second) != 3 || second[80] != first[80] || second[81] != first[81] || second[83] == nil || second[83].Spec.Host.Port() != moved {
		t.Errorf("ports %v, want 80 and 81 as they were, and 83 at %d", second, moved)
	}

	if errs := b.Reconcile("me", nil); errs != nil || len(byGuest()) != 0 {
		t.Errorf("errors %v, ports %v; want none", errs, byGuest())
	}
	if got := ids(b); !slices.Equal(got, []uint64{yours.ID}) {
		t.Errorf("ports %v, want only another owner's %d", got, yours.ID)
	}
}

func TestTooMany(t *testing.T) {
	b, _ := newBook(t, Config{Max: 3})
	for i := range 3 {
		add(t, b, "me", spec(t, fmt.Sprintf("0:%d", i+1)))
	}
	from := time.Now()
	refused, conflicts := 0, 0
	for i := range 65_535 {
		_, err := b.Add("me", spec(t, fmt.Sprintf("%d:80", i+1)))
		var conflict *ConflictError
		switch {
		case errors.Is(err, ErrTooMany):
			refused++
		case errors.As(err, &conflict):
			conflicts++
		}
	}
	if refused != 65_532 || conflicts != 3 {
		t.Errorf("%d refused, %d conflicts with what is there; want 65532 and 3", refused, conflicts)
	}
	if d := time.Since(from); d > time.Minute { // 0.1 s; with a look into /proc for each it would be hours
		t.Errorf("65535 refusals took %v", d)
	}
	add(t, b, "me", spec(t, "0:1")) // what is there is no more than there is
	b.Remove(b.List()[0].ID)
	add(t, b, "me", spec(t, "0:4"))
}

func TestTooManySockets(t *testing.T) {
	b, _ := newBook(t, Config{})
	b.maxSocks = 3
	add(t, b, "me", spec(t, "0:80"))
	_, err := b.Add("me", spec(t, "0:81"))
	if !errors.Is(err, ErrTooMany) || hint(err) == "" {
		t.Errorf("error %v (hint %q), want ErrTooMany", err, hint(err))
	}
	add(t, b, "me", spec(t, "127.0.0.1:0:81"))
}

func TestThousand(t *testing.T) {
	const enough = 1500 * time.Millisecond
	b, c := newBook(t, Config{})
	var took time.Duration
	for range 5 { // others may have the machine for a while, not every time
		from := time.Now()
		for i := range 1000 {
			add(t, b, "me", spec(t, fmt.Sprintf("0:%d", i+1)))
		}
		if n := c.isOpen(); n != 2000 {
			t.Errorf("%d sockets, want 2000", n)
		}
		for _, p := range b.List() {
			if err := b.Remove(p.ID); err != nil {
				t.Fatal(err)
			}
		}
		if took = time.Since(from); took <= enough {
			return
		}
	}
	t.Errorf("adding and removing 1,000 ports took %v, want at most %v", took, enough)
}

// Everybody at once on a few ports: whatever is answered is so.
func TestConcurrent(t *testing.T) {
	b, c := newBook(t, Config{Yields: "owner0"})
	base := spec(t, "127.0.0.1:0:80")
	var specs []flow.PortSpec
	for range 8 {
		specs = append(specs, at(base, freePort(t)))
	}
	var wg sync.WaitGroup
	for i := range 32 {
		wg.Go(func() {
			owner := fmt.Sprint("owner", i%4)
			for n := range 50 {
				s := specs[(i+n)%len(specs)]
				p, err := b.Add(owner, s)
				var conflict *ConflictError
				switch {
				case errors.As(err, &conflict):
				case err != nil:
					t.Error(err)
				case p.Owner() != owner || p.Spec.Host != s.Host:
					t.Errorf("Add(%s, %v) = %+v", owner, s, p)
				}
				switch n % 4 {
				case 0:
					b.RemoveSpec(owner, s)
				case 1:
					b.Reconcile(owner, specs[:2])
				case 2:
					b.RemoveOwner(owner)
				case 3:
					b.List()
					b.Update("", nil, "")
				}
			}
		})
	}
	wg.Wait()
	if l := b.List(); len(l) != c.isOpen() {
		t.Errorf("%d ports, %d sockets", len(l), c.isOpen())
	}
}
