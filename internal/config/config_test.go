package config

import (
	"log/slog"
	"strings"
	"testing"
	"time"
)

func TestLayers(t *testing.T) {
	c, err := Parse("s.toml", []byte("mtu = 1300\nstop_timeout = \"1s\"\n[engine.a]\nmtu = 1400\n"))
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Set("log_level", "debug", "--log-level"); err != nil {
		t.Fatal(err)
	}
	for name, mtu := range map[string]int{"a": 1400, "b": 1300} {
		e, err := c.Engine(name)
		if err != nil {
			t.Fatal(err)
		}
		if e.MTU != mtu || e.StopTimeout != time.Second || e.LogLevel != slog.LevelDebug || e.MaxDials != 4096 {
			t.Errorf("engine %s: %+v", name, e.Settings)
		}
	}
	if err := c.Set("mtu", "1500", "--mtu"); err != nil {
		t.Fatal(err)
	}
	if e, _ := c.Engine("a"); e.MTU != 1500 {
		t.Errorf("mtu is %d: a flag is over the file", e.MTU)
	}
	if !c.Pinned("a", "stop_timeout") || c.Pinned("a", "ipv4_subnet") {
		t.Error("pinned is what somebody set")
	}
}

func TestSet(t *testing.T) {
	tests := []struct{ key, value, want string }{ // want: in the error, or empty
		{"host_access", "80,8000-8010", ""},
		{"host_access", "none", ""},
		{"host_access", "80,", "port"},
		{"isolate", "net,mount,pid", ""},
		{"isolate", "net,mounts", `must be a list of "net"`},
		{"mtu", "1280", ""},
		{"mtu", "1279", "1280..65535"},
		{"mtu", "fast", "1280..65535"},
		{"path", "netstack", ""},
		{"path", "tunnel", "not allowed"},
		{"path", "Auto", `must be "auto", "kernel" or "netstack"`},
		{"stop_timeout", "2h", "0s..1h"},
		{"log_level", "loud", `"debug"`},
		{"limits.dials", "65537", "1..65536"},
		{"no_such", "1", "unknown setting"},
	}
	for _, tt := range tests {
		err := Default().Set(tt.key, tt.value, "--x")
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("Set(%s, %s) = %v, want %q", tt.key, tt.value, err, tt.want)
		}
	}
}

func TestPortSet(t *testing.T) {
	var h PortSet
	if err := setPortSet(&h, "80, 8000-8010"); err != nil {
		t.Fatal(err)
	}
	for port, want := range map[uint16]bool{79: false, 80: true, 81: false, 7999: false, 8000: true, 8010: true, 8011: false} {
		if h.Allows(port) != want {
			t.Errorf("Allows(%d) = %v", port, !want)
		}
	}
	if (PortSet{}).Allows(80) || !(PortSet{All: true}).Allows(80) {
		t.Error("none allows nothing and all everything")
	}
	if err := setPortSet(&h, strings.Repeat("1,", maxPortSet)+"1"); err == nil {
		t.Error("a list longer than the limit was taken")
	}
	for _, tt := range []struct {
		v    any
		want string
	}{
		{[]any{}, "none"},
		{[]any{"none"}, "none"},
		{[]any{"all"}, "all"},
		{" all ", "all"},
		{[]any{int64(80), "8000-8010, 90", "1"}, "80,8000-8010,90,1"},
		{[]any{"all", "80"}, `"all" is no port and no range of ports`},
		{[]any{"80,http", "x"}, `"http" is no port and no range of ports` + "\n" + `"x" is no port and no range of ports`},
		{[]any{true}, "not allowed"},
		{true, "not allowed"},
		{"", `"" is no port and no range of ports`},
	} {
		h := PortSet{Ports: []Ports{{7, 7}}}
		got := ""
		if err := setPortSet(&h, tt.v); err == nil {
			got = h.String()
		} else if got = err.Error(); h.String() != "7" {
			t.Errorf("%v: %v, and the set became %v", tt.v, err, h)
		}
		if got != tt.want {
			t.Errorf("%v: %s, want %s", tt.v, got, tt.want)
		}
	}
}

func FuzzPortSet(f *testing.F) {
	for _, s := range []string{"none", "all", "80", "80,8000-8010", "-", "1-0", "65535-65536", "+1", "0x10"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		var h, again PortSet
		if setPortSet(&h, s) != nil {
			return
		}
		err := setPortSet(&again, h.String())
		if err != nil || again.String() != h.String() {
			t.Errorf("%q became %v, and that %v, %v", s, h, again, err)
		}
		for _, p := range h.Ports {
			if p.First == 0 || p.First > p.Last || !h.Allows(p.First) || !h.Allows(p.Last) {
				t.Errorf("%q has the range %v", s, p)
			}
		}
	})
}

func TestCheckName(t *testing.T) {
	for name, ok := range map[string]bool{
		"a": true, "Docker-1_x.y": true, "0": true, strings.Repeat("a", maxName): true,
		"": false, ".": false, "..": false, "-a": false, "_a": false, "a/b": false, "a b": false, "ä": false,
		strings.Repeat("a", maxName+1): false, "a\x00": false,
	} {
		if err := CheckName(name); (err == nil) != ok {
			t.Errorf("CheckName(%q) = %v", name, err)
		}
	}
}
