package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// What a wrong command line gets: one line, a hint where there is one, the status of
// the contract, and nothing on standard output.
func TestErrors(t *testing.T) {
	dir := t.TempDir()
	bad := filepath.Join(dir, "bad.toml")
	if err := os.WriteFile(bad, []byte("mtu = 1\n\nport = 2\n[engine.a]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	two := filepath.Join(dir, "two.toml")
	if err := os.WriteFile(two, []byte("[engine.a]\ncommand = [\"true\"]\n[engine.b]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name string
		args []string
		want []string // each line of standard error contains one of these, in order
	}{
		{"unknown command", []string{"rum"}, []string{`slipway: run command on "rum": `, "hint: did you mean: slipway run"}},
		{"unknown flag", []string{"run", "--colour", "--", "true"}, []string{"slipway: read command line on slipway run: unknown flag: --colour", "hint: slipway run --help"}},
		{"no command", []string{"run"}, []string{"CMD is missing", "hint: "}},
		{"bad name", []string{"run", "--name", "../a", "--", "true"}, []string{`engine name "../a"`, "hint: "}},
		{"long name", []string{"run", "--name", strings.Repeat("a", 33), "--", "true"}, []string{"1 to 32 characters", "hint: "}},
		{"bad ports", []string{"run", "--host-access", "80,http", "--", "true"}, []string{`--host-access: "http" is no port`, "hint: "}},
		{"unknown path", []string{"run", "--path", "tunnel", "--", "true"}, []string{`--path: "tunnel" is not allowed`, "hint: "}},
		{"bad isolation", []string{"run", "--isolate", "user", "--", "true"}, []string{"--isolate: ", "hint: "}},
		{"missing file", []string{"run", "--config", "/none.toml", "--", "true"}, []string{"slipway: read config on /none.toml: no such file"}},
		{"every problem of a file", []string{"run", "--config", bad, "--", "true"},
			[]string{"slipway: " + bad + ":1:7: mtu", "slipway: " + bad + ":3:1: port: unknown key", "hint: "}},
		{"config show of a bad file", []string{"config", "show", "--config", bad}, []string{":1:7: ", ":3:1: ", "hint: "}},
		{"config show of nobody", []string{"config", "show", "nobody"}, []string{"slipway: show configuration on nobody: no such engine is configured or running", "hint: without a name"}},
		{"config show of a mistyped name", []string{"config", "show", "--json", "--config", two, "c"}, []string{"show configuration on c: ", "hint: configured: a, b; "}},
		{"which engine", []string{"up", "--config", two}, []string{"start engine: which one", "hint: configured: a, b"}},
		{"engine without command", []string{"up", "--config", two, "b"}, []string{"start engine on b: it is not configured with a command", "hint: "}},
		{"attach to nothing", []string{"attach"}, []string{"exactly one of --pid and --netns", "hint: "}},
		{"attach to two", []string{"attach", "--pid", "1", "--netns", "/x"}, []string{"exactly one of --pid and --netns", "hint: "}},
		{"attach with new namespaces", []string{"attach", "--pid", "1", "--isolate", "pid"}, []string{"unknown flag: --isolate", "hint: "}},
		{"attach to no process", []string{"attach", "--pid", "0"}, []string{"a process number is above 0", "hint: "}},
		{"attach to a missing file", []string{"attach", "--netns", "/none"}, []string{"slipway: attach on /none: no such file", "hint: name a file such as /run/netns/NAME"}},
		{"exec nowhere", []string{"exec", "a", "--", "true"}, []string{"slipway: exec engine a: not running", "hint: "}},
		{"exec without engine", []string{"exec", "--", "ls", "-l"}, []string{"ENGINE is missing", "hint: "}},
		{"docker without engine", []string{"docker", "--", "ps"}, []string{"ENGINE is missing", "hint: "}},
		{"up without a file", []string{"up"}, []string{"none is configured", `or with kind = "dockerd", into `}},
		{"exec nothing", []string{"exec", "a", "--"}, []string{"CMD is missing", "hint: "}},
		{"status of nobody", []string{"status", "a"}, []string{"slipway: ask engine a: not running", "hint: "}},
		{"flows below none", []string{"flows", "--limit", "-1"}, []string{"slipway: read command line on slipway flows: --limit: -1 is not allowed", "hint: "}},
		{"flows of nobody", []string{"flows", "a"}, []string{"slipway: ask engine a: not running", "hint: "}},
		{"too many words", []string{"ls", "a"}, []string{`"a" is too much`, "hint: "}},
		{"bad target", []string{"probe", "--target", "tcp4=here"}, []string{"slipway: read command line on slipway probe", "hint: "}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := slipway(t, tt.args...)
			lines := strings.Split(strings.TrimSuffix(r.stderr, "\n"), "\n")
			if r.code != 125 || r.stdout != "" || len(lines) != len(tt.want) {
				t.Fatalf("status %d, stdout %q, stderr\n%s", r.code, r.stdout, r.stderr)
			}
			for i, want := range tt.want {
				if !strings.Contains(lines[i], want) {
					t.Errorf("line %d is %q, want %q in it", i+1, lines[i], want)
				}
			}
		})
	}
	nothingLeft(t)
}

// A state directory that others could write to, or that is not ours, is refused.
func TestStateDirectoryOfOthers(t *testing.T) {
	if err := os.Mkdir("/run/slipway", 0o777); err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll("/run/slipway")
	if err := os.Chmod("/run/slipway", 0o777); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"run", "--", "true"}, {"exec", "a", "--", "true"}, {"status", "a"}} {
		r := slipway(t, args...)
		if r.code != 125 || !strings.Contains(r.stderr, "/run/slipway: not a private directory") || !strings.Contains(r.stderr, "hint: ") {
			t.Errorf("%v: status %d, stderr %s", args, r.code, r.stderr)
		}
	}
}

// Every listing prints exactly one JSON document, with and without engines.
func TestJSON(t *testing.T) {
	check := func(args ...string) map[string]any {
		t.Helper()
		r := slipway(t, append(args, "--json")...)
		var v map[string]any
		if err := json.Unmarshal([]byte(r.stdout), &v); err != nil || r.code != 0 {
			t.Fatalf("%v: status %d, %v\n%s%s", args, r.code, err, r.stdout, r.stderr)
		}
		return v
	}
	for _, args := range [][]string{{"ls"}, {"status"}, {"flows"}, {"ports"}, {"version"}, {"config", "show"}} {
		check(args...)
	}
	needEngines(t)
	e := start(t, "json", "run", "--name", "json", "--", "sleep", "60")
	if list := check("ls")["engines"].([]any); len(list) != 1 || list[0].(map[string]any)["name"] != "json" {
		t.Errorf("ls: %v", list)
	}
	if s := check("status", "json")["engine"].(map[string]any); s["mode"] != "run" || s["command_pid"] == nil {
		t.Errorf("status: %v", s)
	}
	if all := check("status")["engines"].([]any); len(all) != 1 {
		t.Errorf("status of all: %v", all)
	}
	if flows, ok := check("flows", "json")["flows"].([]any); !ok || len(flows) != 0 {
		t.Errorf("flows: %v", flows)
	}
	for _, args := range [][]string{{"ls"}, {"status"}, {"flows"}, {"ports"}} { // for people, too
		if r := slipway(t, args...); r.code != 0 || r.stdout == "" || r.stderr != "" {
			t.Errorf("%v: status %d, stdout %q, stderr %q", args, r.code, r.stdout, r.stderr)
		}
	}
	e.Process.Signal(os.Interrupt)
	e.end(t)
	nothingLeft(t)
}

func TestCompletion(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		if r := slipway(t, "completion", shell); r.code != 0 || !strings.Contains(r.stdout, "slipway") {
			t.Errorf("completion %s: status %d, %s", shell, r.code, r.stderr)
		}
	}
}
