package main

import (
	"bytes"
	"strings"
	"testing"
)

func run(events string, skipsFail bool) (out string, ok bool) {
	var b bytes.Buffer
	t := tally{out: &b, suites: make(map[string]*suite)}
	t.read(strings.NewReader(events))
	ok = t.summary(skipsFail)
	return b.String(), ok
}

func TestTally(t *testing.T) {
	pass := `{"Action":"pass","Package":"p","Test":"TestA"}` + "\n" + `{"Action":"pass","Package":"p","Elapsed":1}` + "\n"
	tests := []struct {
		name, events string
		require      bool
		ok           bool
		want         []string
	}{
		{"passes", pass, true, true, []string{"1 passed, 0 failed, 0 skipped\n"}},
		{"nothing ran", "", false, false, []string{"0 passed"}},
		{"no test files", `{"Action":"skip","Package":"q"}` + "\n" + pass, true, true, []string{"1 passed, 0 failed, 0 skipped"}},
		{"leaves are counted", `{"Action":"pass","Package":"p","Test":"TestA/x"}` + "\n" + `{"Action":"pass","Package":"p","Test":"TestA/y"}` + "\n" + pass,
			true, true, []string{"2 passed, 0 failed"}},
		{"a parent that fails by itself", `{"Action":"pass","Package":"p","Test":"TestB/x"}` + "\n" + `{"Action":"output","Package":"p","Test":"TestB","Output":"why\n"}` + "\n" +
			`{"Action":"fail","Package":"p","Test":"TestB"}` + "\n" + `{"Action":"fail","Package":"p"}`, false, false, []string{"    why\n", "1 passed, 1 failed"}},
		{"a failed subtest counts once", `{"Action":"fail","Package":"p","Test":"TestB/x"}` + "\n" + `{"Action":"fail","Package":"p","Test":"TestB"}` + "\n" +
			`{"Action":"fail","Package":"p"}`, false, false, []string{"0 passed, 1 failed"}},
		{"skip", `{"Action":"output","Package":"p","Test":"TestB","Output":"no tun\n"}` + "\n" + `{"Action":"skip","Package":"p","Test":"TestB"}` + "\n" + pass,
			false, true, []string{"    no tun\n", "1 passed, 0 failed, 1 skipped"}},
		{"a note of a test that passes", `{"Action":"output","Package":"p","Test":"TestA","Output":"NOTE: TestA: half of it\n"}` + "\n" + pass,
			true, true, []string{"NOTE: TestA: half of it\n", "1 passed"}},
		{"skip where none may be", `{"Action":"skip","Package":"p","Test":"TestB"}` + "\n" + pass, true, false, []string{"NETNS_TESTS=require"}},
		{"build", `{"ImportPath":"p","Action":"build-output","Output":"x.go:1: oops\n"}` + "\n" + `{"Action":"fail","Package":"p"}`, false, false,
			[]string{"x.go:1: oops", "0 passed, 1 failed"}},
		{"panic", `{"Action":"output","Package":"p","Test":"TestC","Output":"panic: x\n"}` + "\n" + `{"Action":"fail","Package":"p"}`, false, false,
			[]string{"panic: x", "1 failed"}},
		{"cut off", `{"Action":"output","Package":"p","Test":"TestC","Output":"=== RUN\n"}` + "\n", false, false, []string{"p did not finish", "1 failed"}},
		{"words of the go command", "go: no such module\n", false, false, []string{"go: no such module\n"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			out, ok := run(tt.events, tt.require)
			if ok != tt.ok {
				t.Errorf("ok %v, want %v", ok, tt.ok)
			}
			for _, w := range tt.want {
				if !strings.Contains(out, w) {
					t.Errorf("output lacks %q:\n%s", w, out)
				}
			}
		})
	}
}
