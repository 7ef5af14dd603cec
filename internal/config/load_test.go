package config

import (
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "write the golden files anew")

// golden compares got with the file at path.
func golden(t *testing.T, path, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s: got\n%s\nwant\n%s", path, got, want)
	}
}

func files(t *testing.T, dir string) []string {
	t.Helper()
	list, err := filepath.Glob(filepath.Join("testdata", dir, "*.toml"))
	if err != nil || len(list) == 0 {
		t.Fatalf("no files in %s: %v", dir, err)
	}
	return list
}

// parse reads a file under its base name, so that golden files have no directories.
func parse(t *testing.T, path string) (*Config, error) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return Parse(filepath.Base(path), b)
}

func TestBadFiles(t *testing.T) {
	for _, path := range files(t, "bad") {
		t.Run(filepath.Base(path), func(t *testing.T) {
			_, err := parse(t, path)
			var problems Problems
			if !errors.As(err, &problems) {
				t.Fatalf("error %v is not Problems", err)
			}
			golden(t, strings.TrimSuffix(path, ".toml")+".want", err.Error()+"\n")
		})
	}
}

func TestGoodFiles(t *testing.T) {
	for _, path := range files(t, "good") {
		t.Run(filepath.Base(path), func(t *testing.T) {
			c, err := parse(t, path)
			if err != nil {
				t.Fatal(err)
			}
			var b strings.Builder
			for _, name := range append([]string{""}, c.Names()...) {
				dump(t, &b, c, name)
			}
			golden(t, strings.TrimSuffix(path, ".toml")+".want", b.String())
		})
	}
}

// dump writes an engine's values and where they come from.
func dump(t *testing.T, b *strings.Builder, c *Config, name string) {
	t.Helper()
	values, err := c.Values(name)
	if err != nil {
		t.Fatal(err)
	}
	e, err := c.Engine(name)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(b, "engine %q: %s %q in %q\n", name, e.Kind, e.Command, e.Directory)
	for _, k := range slices.Sorted(maps.Keys(e.Environment)) {
		fmt.Fprintf(b, "  %s=%s\n", k, e.Environment[k])
	}
	for _, v := range values {
		fmt.Fprintf(b, "  %s = %s # %s\n", v.Key, v.Value, v.Source)
	}
}

// What `config show` prints is a file that says the same.
func TestShownValuesLoad(t *testing.T) {
	for _, path := range files(t, "good") {
		c, err := parse(t, path)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range append([]string{""}, c.Names()...) {
			values, err := c.Values(name)
			if err != nil {
				t.Fatal(err)
			}
			var b strings.Builder
			for _, v := range values {
				fmt.Fprintf(&b, "%s = %s\n", v.Key, v.Value)
			}
			again, err := Parse("shown.toml", []byte(b.String()))
			if err != nil {
				t.Fatalf("%s, engine %q: %v", path, name, err)
			}
			want, _ := c.Engine(name)
			got, err := again.Engine("")
			if err != nil || fmt.Sprint(got.Settings) != fmt.Sprint(want.Settings) {
				t.Errorf("%s, engine %q: %+v, %v; want %+v", path, name, got.Settings, err, want.Settings)
			}
		}
	}
}

func TestLoadOfWhatIsNoFile(t *testing.T) {
	dir := t.TempDir()
	big := filepath.Join(dir, "big.toml")
	if err := os.WriteFile(big, make([]byte, maxFile+1), 0o600); err != nil {
		t.Fatal(err)
	}
	tests := []struct{ name, path, want string }{
		{"missing", filepath.Join(dir, "none.toml"), "no such file"},
		{"directory", dir, "not a regular file"},
		{"big", big, "bytes are more than"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Load(tt.path)
			if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.HasPrefix(err.Error(), "read config on "+tt.path) {
				t.Errorf("Load = %v, want something with %q", err, tt.want)
			}
			if strings.Count(err.Error(), tt.path) != 1 {
				t.Errorf("%v: names the path more than once", err)
			}
		})
	}
}

// Of a file with far too much wrong in it everything up to maxKeys is said, and then where
// it ends. It takes no longer than its length allows: the limit is many times what it takes, and
// a small part of what comparing each with all before would.
func TestLargeFiles(t *testing.T) {
	const n, limit = 40000, 2 * time.Second
	repeat := func(format string) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, format, i)
		}
		return b.String()
	}
	tooMany := func(line int) string {
		return fmt.Sprintf("s.toml:%d:1: there are more than %d keys, and nothing from here on was read: each part of a dotted key, or of the name of a table, is one", line, maxKeys)
	}
	tests := []struct {
		name, text string
		problems   int
		last       string // the begin of the last one
	}{
		{"keys", repeat("key%d = 1\n"), maxKeys + 1, tooMany(maxKeys + 1)},
		{"tables", repeat("[t%d]\n"), maxKeys + 1, tooMany(maxKeys + 1)},
		{"good tables", repeat("[engine.e%d]\nmtu = 1500\n"), 1, tooMany(maxKeys/3*2 + 1)},
		{"environment", "[engine.a.environment]\n" + repeat("A%d = \"x\"\n"), 1, tooMany(maxKeys - 3 + 2)},
		{"inline tables", "mtu = 1\n\nlimits = { " + repeat("a%d = 1, ") + "dials = 1 }\n", 2, tooMany(3)},
		{"tables in lists", "mtu = 1\nisolate = [\n" + repeat("{ a%d = 1 },\n") + "]\n", 2, tooMany(2)},
		{"dotted", "mtu = 1\n" + strings.Repeat("a.", n) + "a = 1\n", 2, tooMany(2)},
		{"ports", "host_access = [\n" + repeat("\"x%d\",\n") + "]\n", n, "s.toml:40001:1: host_access: \"x39999\" is no port"},
		{"published", "publish = [\n" + repeat("\"x%d\",\n") + "]\n", n, "s.toml:40001:1: publish: port \"x39999\": must be"},
		{"command", "[engine.a]\ncommand = [\n" + repeat("%d,\n") + "]\n", n, "s.toml:40002:1: command: 39999 is not allowed"},
		{"ranges", "publish = [" + repeat("\"1-16385:1-16385\", # %d\n") + "]\n", 1, "s.toml:1:12: publish: there are more than 16384 ports"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			begin := time.Now()
			_, err := Parse("s.toml", []byte(tt.text))
			if took := time.Since(begin); took > limit {
				t.Errorf("it takes %v", took)
			}
			var all Problems
			if !errors.As(err, &all) || len(all) != tt.problems || !strings.HasPrefix(all[len(all)-1].Error(), tt.last) {
				t.Fatalf("%d problems, expected %d; the last is %v, expected %s", len(all), tt.problems, all[len(all)-1], tt.last)
			}
		})
	}
	// As many keys as there may be.
	if _, err := Parse("s.toml", []byte("[engine.a.environment]\n"+strings.Join(strings.SplitAfter(repeat("A%d = \"x\"\n"), "\n")[:maxKeys-3], ""))); err != nil {
		t.Error(err)
	}
	// What is broken behind the end does not hide the rest.
	_, err := Parse("s.toml", []byte(repeat("key%d = 1\n")+"=\n"))
	if all := (Problems)(nil); !errors.As(err, &all) || len(all) != maxKeys+1 {
		t.Errorf("with broken syntax at the end: %d problems", len(all))
	}
}

func TestFind(t *testing.T) {
	home := t.TempDir()
	t.Setenv("XDG_CONFIG_HOME", home)
	t.Setenv("HOME", home)
	path := filepath.Join(home, "slipway", "slipway.toml")
	if got := Find(1000); got == path {
		t.Fatalf("Find found %s, which is not there", got)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if dir, err := os.UserConfigDir(); err != nil || dir != home {
		t.Skipf("the configuration directory of this system is %s, not $XDG_CONFIG_HOME", dir)
	}
	if got := Find(1000); got != path {
		t.Errorf("Find = %q, want %q", got, path)
	}
	if got := Find(0); got == path {
		t.Error("root was sent to a file in a home directory")
	}
}

func FuzzParse(f *testing.F) {
	for _, dir := range []string{"bad", "good"} {
		list, _ := filepath.Glob(filepath.Join("testdata", dir, "*.toml"))
		for _, path := range list {
			b, err := os.ReadFile(path)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(b)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := Parse("f.toml", b)
		if err != nil {
			var problems Problems
			if !errors.As(err, &problems) || len(problems) == 0 {
				t.Fatalf("error %v is not Problems", err)
			}
			for _, p := range problems {
				if p.Line < 1 || p.Column < 1 || strings.Contains(p.Text, "\n") {
					t.Fatalf("problem %+v", p)
				}
			}
			return
		}
		for _, name := range append([]string{""}, c.Names()...) {
			if _, err := c.Values(name); err != nil {
				t.Fatalf("a file without problems has bad values: %v", err)
			}
		}
	})
}

// docs/configuration.md has every key with its default, and an example that loads.
func TestDocument(t *testing.T) {
	b, err := os.ReadFile(filepath.Join("..", "..", "docs", "configuration.md"))
	if err != nil {
		t.Fatal(err)
	}
	text := string(b)
	s := defaultSettings()
	for _, k := range keys {
		want := k.get(&s)
		if !strings.Contains(text, "\n| `"+k.name+"` | `"+want+"` | ") && !strings.Contains(text, "\n| `"+k.name+"` | "+want+" | ") {
			t.Errorf("no row for %s with its default %s", k.name, want)
		}
	}
	for _, name := range append(slices.Clone(ownKeys), "environment") {
		if !strings.Contains(text, "\n| `"+name+"` | ") {
			t.Errorf("no row for %s", name)
		}
	}
	_, rest, found := strings.Cut(text, "```toml\n")
	example, _, closed := strings.Cut(rest, "```")
	if _, err := Parse("configuration.md", []byte(example)); err != nil || !found || !closed {
		t.Errorf("the example: %v", err)
	}
}
