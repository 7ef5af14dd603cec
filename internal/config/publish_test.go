package config

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/slipway-net/slipway/internal/flow"
)

func TestSetPublish(t *testing.T) {
	tests := []struct{ key, value, want string }{ // want: in the error, or what is shown
		{"publish", "8080:80", `["8080:80/tcp"]`},
		{"publish", "8080:80,127.0.0.1:5353:53/udp", `["8080:80/tcp", "127.0.0.1:5353:53/udp"]`},
		{"publish", "8000-8002:9000-9002,8003:9003,9000:80", `["8000-8003:9000-9003/tcp", "9000:80/tcp"]`},
		{"publish", "[::1]:0:[fd00::2]:80-81", `["[::1]:0:[fd00::2]:80-81/tcp"]`},
		{"publish", "0.0.0.0:80:80,[::]:80:80,80:80/udp", `["0.0.0.0:80:80/tcp", "[::]:80:80/tcp", "80:80/udp"]`},
		{"publish", "65535:1,1:2", `["65535:1/tcp", "1:2/tcp"]`},
		{"publish", "0:80,0:80", `["0:80/tcp"]`},
		{"publish", "8080:80,8080:80/tcp,*:8080:80", `["8080:80/tcp"]`},
		{"publish", "8000-8002:9000-9002,8001-8003:9001-9003", `["8000-8003:9000-9003/tcp"]`},
		{"publish", "1-16384:1-16384,1-16384:1-16384", "more than 16384 ports"},
		{"publish", "8080:80,127.0.0.1:8080:80", "port 8080/tcp of the host is asked for twice"},
		{"publish", "8080:80,8080:127.0.0.1:80", "port 8080/tcp of the host is asked for twice"},
		{"publish", "8080:80/sctp", "is not tcp or udp"},
		{"publish", "", "HOSTPORT"},
		{"publish", "8080", "HOSTPORT"},
		{"publish", "80:80,80:81", "port 80/tcp of the host is asked for twice"},
		{"publish", "127.0.0.1:80:80,0.0.0.0:80:81", "twice"},
		{"publish", "[::1]:80:80,80:81", "twice"},
		{"publish", "1-16384:1-16384,20000:1", "more than 16384 ports"},
		{"publish", "127.0.0.1:80:80,127.0.0.2:80:80,[::1]:80:81,127.0.0.1:81:80", `["127.0.0.1:80:80/tcp", "127.0.0.2:80:80/tcp", "[::1]:80:81/tcp", "127.0.0.1:81:80/tcp"]`},
		{"publish", "127.0.0.1:80:80,127.0.0.2:80:80,127.0.0.1:80:81", "twice"},
		{"publish", "[::1]:80:80,0.0.0.0:80:80,[::]:80:80", "twice"},
		{"publish", "0.0.0.0:80:80,[::1]:80:80,127.0.0.1:80:80", "twice"},
		{"publish", "127.0.0.1:80:80,80:80", "twice"},
		{"publish_bind", "loopback-only", `"loopback-only"`},
		{"publish_bind", "loopback", `must be "as-asked", "loopback-default" or "loopback-only"`},
		{"publish_ports", "80,8000-8999", `[80, "8000-8999"]`},
		{"publish_ports", "none", `"none"`},
		{"publish_ports", "some", "no port"},
		{"source_ip", "gateway", `"gateway"`},
		{"source_ip", "", `must be "preserve" or "gateway"`},
		{"publish_auto", "true", "true"},
		{"publish_auto", "yes", "must be true or false"},
		{"docker_api", "unix:///run/user/1/a b\".sock", `"unix:///run/user/1/a b\".sock"`},
		{"docker_api", "", `""`},
		{"docker_api", "unix://run/docker.sock", "not allowed"},
		{"docker_api", "tcp://192.0.2.1:2375", "not allowed"},
		{"docker_api", "unix:///" + strings.Repeat("a", maxSocket), "at most 107"},
	}
	for _, tt := range tests {
		c := Default()
		if err := c.Set(tt.key, tt.value, "--x"); err != nil {
			if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Set(%s, %s) = %v, want %q", tt.key, tt.value, err, tt.want)
			}
			continue
		}
		values, err := c.Values("a")
		if err != nil {
			t.Fatal(err)
		}
		i := slices.IndexFunc(values, func(v Value) bool { return v.Key == tt.key })
		if values[i].Value != tt.want {
			t.Errorf("Set(%s, %s) is shown as %s, want %s", tt.key, tt.value, values[i].Value, tt.want)
		}
	}
}

func TestPublishDefaults(t *testing.T) {
	e, err := Default().Engine("a")
	if err != nil {
		t.Fatal(err)
	}
	if e.Kind != KindCommand || e.Publish != nil || e.PublishBind != BindAsAsked || !e.PublishPorts.All ||
		e.SourceIP != flow.SourcePreserve || e.PublishAuto || e.DockerAPI != "" {
		t.Errorf("defaults: %+v", e)
	}
}

// What an engine has of its own is shown with where it stands, and is a file again.
func TestOwn(t *testing.T) {
	c, err := Parse("s.toml", []byte("[engine.a]\nkind = \"dockerd\"\ncommand = [\"--debug\", \"a\\u0001\\\"\"]\n[engine.b]\n"))
	if err != nil {
		t.Fatal(err)
	}
	if got := c.Own("none"); len(got) != 0 {
		t.Errorf("an engine without table has %v", got)
	}
	if got := fmt.Sprint(c.Own("b")[0].Value, c.Own("b")[0].Source, len(c.Own("b"))); got != `"command"default1` {
		t.Errorf("an empty table is shown as %s", got)
	}
	file := "[engine.a]\n"
	for i, v := range c.Own("a") {
		if want := fmt.Sprintf("s.toml:%d", i+2); v.Source != want {
			t.Errorf("%s is from %s, want %s", v.Key, v.Source, want)
		}
		file += v.Key + " = " + v.Value + "\n"
	}
	again, err := Parse("t.toml", []byte(file))
	if err != nil {
		t.Fatal(err)
	}
	want, _ := c.Engine("a")
	got, _ := again.Engine("a")
	if got.Kind != KindDockerd || got.Program != "dockerd" || got.Kind != want.Kind || !slices.Equal(got.Command, want.Command) {
		t.Errorf("%q %q became %q %q", want.Kind, want.Command, got.Kind, got.Command)
	}
}

// A dockerd's command may begin with a program.
func TestDockerdCommand(t *testing.T) {
	for _, tt := range []struct{ command, want string }{
		{"", "dockerd []"},
		{`command = ["--debug"]`, "dockerd [--debug]"},
		{`command = ["/opt/bin/dockerd"]`, "/opt/bin/dockerd []"},
		{`command = ["dockerd-28", "--debug", "x"]`, "dockerd-28 [--debug x]"},
	} {
		c, err := Parse("s.toml", []byte("[engine.a]\nkind = \"dockerd\"\n"+tt.command+"\n"))
		if err != nil {
			t.Fatal(err)
		}
		e, err := c.Engine("a")
		if got := fmt.Sprint(e.Program, " ", e.Command); err != nil || got != tt.want {
			t.Errorf("%s: %s, %v; want %s", tt.command, got, err, tt.want)
		}
	}
}

// Every list that is taken is shown as one that means the same.
func FuzzPublish(f *testing.F) {
	for _, s := range []string{"8080:80", "1-3:4-6,4:7", "[::1]:0:[fd00::1]:1-2/udp", "*:80:192.0.2.1:80", "80:80,", "1-65535:1-65535", "0:65535,0:65535"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		var specs, again []flow.PortSpec
		if setPublish(&specs, s) != nil {
			return
		}
		if len(specs) == 0 || len(specs) > maxPublish {
			t.Fatalf("%q has %d ports", s, len(specs))
		}
		text := foldSpecs(specs)
		if err := setPublish(&again, strings.Join(text, ",")); err != nil || !slices.Equal(specs, again) {
			t.Errorf("%q became %q, and that is %v, %v", s, text, again, err)
		}
	})
}

// What config show prints of an engine's environment means the same in a file.
func TestOwnEnvironment(t *testing.T) {
	const text = "[engine.a]\nenvironment = { \"B.C\" = \"x \\\"y\\\"\", A = \"1\" }\n"
	c, err := Parse("s.toml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	own := c.Own("a")
	last := own[len(own)-1]
	if last.Key != "environment" || last.Source != "s.toml" || last.Value != `{ "A" = "1", "B.C" = "x \"y\"" }` {
		t.Fatalf("%+v", last)
	}
	again, err := Parse("s.toml", []byte("[engine.a]\nenvironment = "+last.Value+"\n"))
	if err != nil || !maps.Equal(again.engines["a"].environment, c.engines["a"].environment) {
		t.Errorf("%v, %v", again, err)
	}
}
