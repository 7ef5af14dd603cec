package daemon

import (
	"strings"
	"testing"

	"github.com/slipway-net/slipway/internal/config"
)

func TestNameFor(t *testing.T) {
	tests := []struct {
		command []string
		want    string
	}{
		{[]string{"dockerd"}, "dockerd-7"},
		{[]string{"/usr/bin/docker d"}, "docker-d-7"},
		{[]string{"./.hidden"}, "hidden-7"},
		{[]string{"ünïcode"}, "n-code-7"},
		{[]string{"/"}, "engine-7"},
		{nil, "engine-7"},
		{[]string{strings.Repeat("x", 100)}, strings.Repeat("x", 20) + "-7"},
	}
	for _, tt := range tests {
		got := NameFor(tt.command, 7)
		if got != tt.want {
			t.Errorf("NameFor(%q) = %q, want %q", tt.command, got, tt.want)
		}
		if err := config.CheckName(got); err != nil {
			t.Errorf("NameFor(%q): %v", tt.command, err)
		}
	}
	if err := config.CheckName(NameFor([]string{strings.Repeat("x", 100)}, 1<<22)); err != nil { // pid_max, proc(5)
		t.Error(err)
	}
}
