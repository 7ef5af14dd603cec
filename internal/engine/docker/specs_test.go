package docker

import (
	"encoding/json"
	"net/netip"
	"slices"
	"testing"

	"github.com/slipway-net/slipway/internal/flow"
)

func ap(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

// published is a spec of ours: host 0.0.0.0:8080, container 172.17.0.2:80 or "".
func published(proto flow.Proto, host, behind string) flow.PortSpec {
	s := flow.PortSpec{Proto: proto, Host: ap(host)}
	s.Guest = netip.AddrPortFrom(netip.Addr{}, s.Host.Port())
	if behind != "" {
		s.Behind = ap(behind)
	}
	return s
}

// everywhere is s on all addresses of both families.
func everywhere(s flow.PortSpec) flow.PortSpec {
	s.Host = netip.AddrPortFrom(netip.Addr{}, s.Host.Port())
	return s
}

func TestContainerSpecs(t *testing.T) {
	tests := []struct {
		name, json string
		want       []flow.PortSpec
	}{
		// As engines answered.
		{"docker_20", `{"Id":"a32bc0","Names":["/ca"],"Ports":[
			{"IP":"0.0.0.0","PrivatePort":53,"PublicPort":8053,"Type":"udp"},{"IP":"::","PrivatePort":53,"PublicPort":8053,"Type":"udp"},
			{"PrivatePort":443,"Type":"tcp"},
			{"IP":"127.0.0.1","PrivatePort":80,"PublicPort":8080,"Type":"tcp"}],"State":"running",
			"NetworkSettings":{"Networks":{"bridge":{"Gateway":"172.17.0.1","IPAddress":"172.17.0.2","IPv6Gateway":"","GlobalIPv6Address":""}}}}`,
			[]flow.PortSpec{
				published(flow.UDP, "0.0.0.0:8053", "172.17.0.2:53"), published(flow.UDP, "[::]:8053", "172.17.0.2:53"),
				published(flow.TCP, "127.0.0.1:8080", "172.17.0.2:80"),
			}},
		{"two_networks_and_families", `{"Ports":[
			{"IP":"0.0.0.0","PrivatePort":80,"PublicPort":8095,"Type":"tcp"},{"IP":"::","PrivatePort":80,"PublicPort":8095,"Type":"tcp"}],
			"NetworkSettings":{"Networks":{
				"bridge":{"GwPriority":0,"Gateway":"172.17.0.1","IPAddress":"172.17.0.2"},
				"n2":{"GwPriority":1,"Gateway":"172.18.0.1","IPAddress":"172.18.0.2","IPv6Gateway":"fd00:d0d::1","GlobalIPv6Address":"fd00:d0d::2"}}}}`,
			[]flow.PortSpec{published(flow.TCP, "0.0.0.0:8095", "172.18.0.2:80"), published(flow.TCP, "[::]:8095", "[fd00:d0d::2]:80")}},
		{"swarm_task", `{"Ports":[{"IP":"0.0.0.0","PrivatePort":81,"PublicPort":8071,"Type":"tcp"}],
			"NetworkSettings":{"Networks":{"ingress":{"Gateway":"","IPAddress":"10.0.0.4"}}}}`,
			[]flow.PortSpec{published(flow.TCP, "0.0.0.0:8071", "")}},
		{"podman", `{"Ports":[{"PrivatePort":80,"PublicPort":8060,"Type":"tcp"}],
			"NetworkSettings":{"Networks":{"podman":{"Gateway":"10.88.0.1","IPAddress":"10.88.0.5"}}}}`,
			[]flow.PortSpec{everywhere(published(flow.TCP, "0.0.0.0:8060", "10.88.0.5:80"))}},

		{"host_network", `{"Ports":[],"NetworkSettings":{"Networks":{"host":{"Gateway":"","IPAddress":""}}}}`, nil},
		{"sctp", `{"Ports":[{"IP":"0.0.0.0","PrivatePort":80,"PublicPort":8080,"Type":"sctp"}]}`, nil},
		{"no_address", `{"Ports":[{"IP":"everywhere","PrivatePort":80,"PublicPort":8080,"Type":"tcp"}]}`, nil},
		{"no_port", `{"Ports":[{"IP":"0.0.0.0","PrivatePort":80,"PublicPort":65536,"Type":"tcp"}]}`, nil},
		{"nothing", `{}`, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var c container
			if err := json.Unmarshal([]byte(tt.json), &c); err != nil {
				t.Fatal(err)
			}
			if got := c.specs(); !slices.Equal(got, tt.want) {
				t.Errorf("specs are\n%+v, want\n%+v", got, tt.want)
			}
		})
	}
}

func TestServiceSpecs(t *testing.T) {
	const text = `{"ID":"jtxxld","Endpoint":{"Spec":{},"Ports":[
		{"Protocol":"tcp","TargetPort":80,"PublishedPort":8070,"PublishMode":"ingress"},
		{"Protocol":"udp","TargetPort":80,"PublishedPort":8072,"PublishMode":"ingress"},
		{"Protocol":"tcp","TargetPort":81,"PublishedPort":8071,"PublishMode":"host"},
		{"Protocol":"sctp","TargetPort":81,"PublishedPort":8073,"PublishMode":"ingress"}]}}`
	var s service
	if err := json.Unmarshal([]byte(text), &s); err != nil {
		t.Fatal(err)
	}
	want := []flow.PortSpec{published(flow.TCP, "0.0.0.0:8070", ""), published(flow.UDP, "0.0.0.0:8072", "")}
	if got := s.specs(); !slices.Equal(got, want) {
		t.Errorf("specs are %+v, want %+v", got, want)
	}
}

func TestTidy(t *testing.T) {
	a, b, c := published(flow.TCP, "0.0.0.0:80", "172.17.0.2:80"), published(flow.TCP, "[::]:80", ""), published(flow.UDP, "0.0.0.0:80", "")
	again := published(flow.TCP, "0.0.0.0:80", "172.17.0.3:80")
	if got, want := tidy([]flow.PortSpec{c, b, a, again}), []flow.PortSpec{a, b, c}; !slices.Equal(got, want) {
		t.Errorf("tidy makes %+v, want %+v", got, want)
	}
}

// check says what no spec may be.
func check(t *testing.T, specs []flow.PortSpec) {
	t.Helper()
	for _, s := range specs {
		if s.Proto != flow.TCP && s.Proto != flow.UDP || s.Host.Port() == 0 || s.Guest.Addr().IsValid() ||
			s.Host.Addr().Zone() != "" || s.Host.Addr().Is4In6() || s.Behind.IsValid() && (s.Behind.Port() == 0 || s.Behind.Addr().IsUnspecified()) {
			t.Errorf("%+v cannot be published", s)
		}
	}
}

// FuzzContainers: an engine's answers become specs that can be published, or none.
func FuzzContainers(f *testing.F) {
	f.Add([]byte(`[{"Id":"a","Ports":[{"IP":"::ffff:1.2.3.4","PrivatePort":1,"PublicPort":2,"Type":"udp"}],"NetworkSettings":{"Networks":{"n":{"Gateway":"g","IPAddress":"::"}}}}]`))
	f.Add([]byte(`[{"Ports":[{"PublicPort":-1,"Type":"tcp"}],"NetworkSettings":null},null]`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var list []container
		if json.Unmarshal(b, &list) != nil {
			return
		}
		for _, c := range list {
			check(t, c.specs())
		}
	})
}

// FuzzInspection is the same for podman's other answer.
func FuzzInspection(f *testing.F) {
	f.Add([]byte(`{"NetworkSettings":{"Ports":{"80/tcp":[{"HostIp":"0.0.0.0","HostPort":"8060"}],"91/tcp":null,"/":[{}]}}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var i inspection
		if json.Unmarshal(b, &i) == nil {
			check(t, container{Ports: i.ports()}.specs())
		}
	})
}

// FuzzServices is the same for a swarm's.
func FuzzServices(f *testing.F) {
	f.Add([]byte(`[{"Endpoint":{"Ports":[{"Protocol":"tcp","PublishedPort":8070,"PublishMode":"ingress"}]}}]`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var list []service
		if json.Unmarshal(b, &list) != nil {
			return
		}
		for _, s := range list {
			check(t, s.specs())
		}
	})
}
