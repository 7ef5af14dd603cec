package config

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// Theory of operation.
//
// The file is read three times. First its keys are counted: where there are more than
// maxKeys the rest is cut off, with a problem that says so. Then go-toml's decoder finds
// what is no TOML at all: broken syntax, bad escapes, a key twice, for which it compares
// each key with all before. There it ends, for what follows a broken line means nothing.
// At last the syntax tree is walked, where every key still has its line and column, and
// each value goes to its key in keys.go; here every problem is kept and all are returned
// together, in the order of the file. The time that this takes grows as the file does.
//
//	top level key ........ for all engines
//	[engine.NAME] key .... for that engine, over the general one
//	kind, command, directory, environment ... only there

// maxFile is far beyond any real file, in bytes; more is somebody's mistake.
const maxFile = 1 << 20

// maxKeys is far beyond any real file, too; a dotted key, or name of a table, counts as its parts.
const maxKeys = 4096

// Problem is one thing wrong in a file.
type Problem struct {
	File         string
	Line, Column int // from 1
	Text         string
}

// Error returns "FILE:LINE:COLUMN: TEXT".
func (p *Problem) Error() string {
	return fmt.Sprintf("%s:%d:%d: %s", p.File, p.Line, p.Column, p.Text)
}

// Problems is everything wrong in a file, in the order of the file.
type Problems []*Problem

// Error returns the problems, one a line.
func (p Problems) Error() string {
	lines := make([]string, len(p))
	for i, one := range p {
		lines[i] = one.Error()
	}
	return strings.Join(lines, "\n")
}

// Load reads the file at path. The error is of os.Open and friends, or Problems.
func Load(path string) (*Config, error) {
	b, err := readFile(path)
	if err != nil {
		return nil, err
	}
	return Parse(path, b)
}

func readFile(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("read config on %s: %w", path, bare(err))
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("read config on %s: not a regular file", path)
	}
	if info.Size() > maxFile {
		return nil, fmt.Errorf("read config on %s: %d bytes are more than %d", path, info.Size(), maxFile)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read config on %s: %w", path, bare(err))
	}
	return b, nil
}

// bare drops the path that our own message has already.
func bare(err error) error {
	if pe := (*os.PathError)(nil); errors.As(err, &pe) {
		return pe.Err
	}
	return err
}

// Find returns the file to load when no --config is given, or "" when there is none:
// for root /etc/slipway/slipway.toml, for others first slipway/slipway.toml in
// $XDG_CONFIG_HOME (~/.config). Root never reads a file from a home directory, which
// under sudo may be somebody else's.
func Find(euid int) string {
	for _, path := range candidates(euid) {
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			return path // also when it cannot be read: Load then says why
		}
	}
	return ""
}

// Usual returns the file that a user without one would write.
func Usual(euid int) string { return candidates(euid)[0] }

// candidates are the files that Find looks for, at least one.
func candidates(euid int) []string {
	all := []string{filepath.Join("/etc", "slipway", "slipway.toml")}
	if euid != 0 {
		if dir, err := os.UserConfigDir(); err == nil {
			all = slices.Insert(all, 0, filepath.Join(dir, "slipway", "slipway.toml"))
		}
	}
	return all
}

// Parse reads b, the content of file. The error is Problems.
func Parse(file string, b []byte) (*Config, error) {
	r := &reader{file: file, config: Default(), lines: linesOf(b)}
	r.config.file = file
	b, tooMany := r.cut(b)
	if p := r.syntax(b); p != nil {
		return nil, Problems{p}
	}
	r.walk(b)
	if tooMany != nil {
		r.problems = append(r.problems, tooMany)
	}
	if len(r.problems) > 0 {
		return nil, r.problems
	}
	return r.config, nil
}

// reader turns one file into a Config.
type reader struct {
	file     string
	config   *Config
	parser   unstable.Parser
	lines    []int // where each line begins
	problems Problems
}

// linesOf returns where each line of b begins.
func linesOf(b []byte) []int {
	lines := []int{0}
	for i, c := range b {
		if c == '\n' {
			lines = append(lines, i+1)
		}
	}
	return lines
}

// place returns the line and the column of a byte, both from 1.
func (r *reader) place(offset int) (line, column int) {
	line, _ = slices.BinarySearch(r.lines, offset+1)
	return line, offset - r.lines[line-1] + 1
}

// cut returns what of b has no more than maxKeys keys, and the problem if that is not all. It
// stops at broken syntax, which is left to say for others.
func (r *reader) cut(b []byte) ([]byte, *Problem) {
	r.parser.Reset(b)
	for n := 0; r.parser.NextExpression(); {
		e := r.parser.Expression()
		if n += keysIn(e); n > maxKeys {
			line, _ := r.place(int(position(e).Offset))
			return b[:r.lines[line-1]], &Problem{r.file, line, 1, fmt.Sprintf("there are more than %d keys, and nothing from here on was read: each part of a dotted key, or of the name of a table, is one", maxKeys)}
		}
	}
	return b, nil
}

// keysIn counts the parts of the keys of a table's head, or of a key and its value.
func keysIn(e *unstable.Node) (n int) {
	switch e.Kind {
	case unstable.Table, unstable.ArrayTable:
		return len(keyOf(e))
	case unstable.KeyValue:
		return len(keyOf(e)) + keysIn(e.Value())
	case unstable.InlineTable, unstable.Array:
		for it := e.Children(); it.Next(); {
			n += keysIn(it.Node())
		}
	}
	return n
}

// syntax returns what go-toml's decoder finds, or nil.
func (r *reader) syntax(b []byte) *Problem {
	var any map[string]any
	err := toml.Unmarshal(b, &any)
	if err == nil {
		return nil
	}
	p := &Problem{File: r.file, Line: 1, Column: 1, Text: strings.TrimPrefix(err.Error(), "toml: ")}
	if de := (*toml.DecodeError)(nil); errors.As(err, &de) {
		p.Line, p.Column = de.Position()
	}
	return p
}

// walk visits every key of the file.
func (r *reader) walk(b []byte) {
	r.parser.Reset(b)
	var table []string
	known := true
	for r.parser.NextExpression() {
		switch e := r.parser.Expression(); e.Kind {
		case unstable.Table:
			table = keyOf(e)
			known = r.table(e, table)
		case unstable.ArrayTable:
			table, known = keyOf(e), false
			r.add(position(e), fmt.Sprintf("[[%s]]: there are no lists of tables here", strings.Join(table, ".")))
		case unstable.KeyValue:
			if known { // else one problem is enough
				r.keyValue(table, e)
			}
		}
	}
}

// table checks the head of a table and reports whether there is one of that name.
func (r *reader) table(e *unstable.Node, path []string) bool {
	inside := path
	if path[0] == "engine" {
		if len(path) == 1 {
			return true
		}
		r.engine(e, path[1])
		inside = path[2:]
	}
	switch {
	case len(inside) == 0:
	case len(inside) == 1 && inside[0] == "limits":
	case len(path) == 3 && len(inside) == 1 && inside[0] == "environment":
	default:
		r.add(position(e), fmt.Sprintf("[%s]: unknown table%s", strings.Join(path, "."), didYouMean(inside[0], "engine", "limits")))
		return false
	}
	return true
}

// engine returns the engine called name, making it.
func (r *reader) engine(e *unstable.Node, name string) *engine {
	own := r.config.engines[name]
	if own == nil {
		if err := CheckName(name); err != nil {
			r.add(position(e), err.Error())
		}
		own = &engine{layer: layer{}, sources: map[string]string{}}
		r.config.engines[name] = own
	}
	return own
}

// keyValue takes one "key = value" below table; a table as value is taken apart.
func (r *reader) keyValue(table []string, e *unstable.Node) {
	path := append(slices.Clone(table), keyOf(e)...)
	var own *engine
	name := path
	if path[0] == "engine" && len(path) >= 3 {
		own, name = r.engine(e, path[1]), path[2:]
	}
	if own != nil && name[0] == "environment" {
		r.environment(own, name[1:], e)
		return
	}
	if e.Value().Kind == unstable.InlineTable {
		if !r.table(e, path) {
			return
		}
		for it := e.Value().Children(); it.Next(); {
			r.keyValue(path, it.Node())
		}
		return
	}
	r.set(own, strings.Join(name, "."), e)
}

// set stores one value in the engine's layer, or the general one for nil.
func (r *reader) set(own *engine, name string, e *unstable.Node) {
	v := valueOf(e.Value())
	if own != nil && slices.Contains(ownKeys, name) {
		r.bad(e, own.set(name, v))
		own.sources[name] = r.source(e)
		return
	}
	k, ok := lookup(name)
	if !ok {
		r.unknown(own, name, e)
		return
	}
	s := defaultSettings()
	if err := k.set(&s, v); err != nil {
		r.bad(e, err)
		return
	}
	to := r.config.base
	if own != nil {
		to = own.layer
	}
	to[name] = setting{v, r.source(e)}
}

// ownKeys are the values that only an engine has; it has an environment, too.
var ownKeys = []string{"kind", "command", "directory"}

// source says where a node stands.
func (r *reader) source(e *unstable.Node) string {
	line, _ := r.place(int(position(e).Offset))
	return fmt.Sprintf("%s:%d", r.file, line)
}

func (r *reader) unknown(own *engine, name string, e *unstable.Node) {
	known := make([]string, 0, len(keys)+len(ownKeys)+1)
	for _, k := range keys {
		known = append(known, k.name)
	}
	if own != nil {
		known = append(append(known, ownKeys...), "environment")
	}
	text := name + ": unknown key"
	if own == nil && (slices.Contains(ownKeys, name) || strings.HasPrefix(name, "environment")) {
		text += ": it belongs into a table [engine.NAME]"
	} else {
		text += didYouMean(name, known...)
	}
	r.add(position(e), text)
}

// set stores what only an engine has.
func (own *engine) set(name string, v any) error {
	switch name {
	case "kind":
		if err := oneOf(&own.kind, v, KindCommand, KindDockerd); err != nil {
			return fmt.Errorf(`kind: %s is not allowed: must be "command" or "dockerd"`, show(v))
		}
		return nil
	case "directory":
		dir, ok := v.(string)
		if !ok || !filepath.IsAbs(dir) {
			return fmt.Errorf("directory: %s is not allowed: must be an absolute path", show(v))
		}
		own.directory = dir
		return nil
	}
	return own.setCommand(v)
}

func (own *engine) setCommand(v any) error {
	const must = "must be a list of a program and its arguments"
	list, _ := v.([]any)
	if len(list) == 0 {
		return fmt.Errorf("command: %s is not allowed: %s", show(v), must)
	}
	var all []error
	for i, e := range list {
		word, isString := e.(string)
		if !isString || strings.Contains(word, "\x00") || i == 0 && word == "" {
			all = append(all, &elementError{i, fmt.Errorf("command: %s is not allowed: %s", show(e), must)})
		}
		own.command = append(own.command, word)
	}
	return errors.Join(all...)
}

// environment takes the table of that name, written in any of TOML's ways.
func (r *reader) environment(own *engine, rest []string, e *unstable.Node) {
	switch v := e.Value(); {
	case len(rest) == 0 && v.Kind == unstable.InlineTable:
		for it := v.Children(); it.Next(); {
			r.environment(own, keyOf(it.Node()), it.Node())
		}
	case len(rest) == 1 && v.Kind == unstable.String && validVariable(rest[0], string(v.Data)):
		if own.environment == nil {
			own.environment = make(map[string]string)
		}
		own.environment[rest[0]] = string(v.Data)
	default:
		r.add(position(e), "environment: must be a table of NAME = \"value\"")
	}
}

func validVariable(name, value string) bool {
	return name != "" && !strings.ContainsAny(name, "=\x00") && !strings.Contains(value, "\x00")
}

func (r *reader) add(at unstable.Range, text string) {
	line, column := r.place(int(at.Offset))
	r.problems = append(r.problems, &Problem{r.file, line, column, text})
}

// bad adds what is wrong with a node's value, each error at its place.
func (r *reader) bad(e *unstable.Node, err error) {
	var elements []unstable.Range // where those of a list start
	all := each(err)
	if len(all) > 0 && e.Value().Kind == unstable.Array {
		elements = r.elements(e)
	}
	for _, err := range all {
		at := r.valuePosition(e)
		if in := (*elementError)(nil); errors.As(err, &in) && in.n < len(elements) {
			at = elements[in.n]
		}
		r.add(at, err.Error())
	}
}

// keyOf returns the parts of a node's dotted key.
func keyOf(e *unstable.Node) []string {
	var parts []string
	for it := e.Key(); it.Next(); {
		parts = append(parts, string(it.Node().Data))
	}
	return parts
}

// position is where a node's key starts.
func position(e *unstable.Node) unstable.Range {
	it := e.Key()
	it.Next()
	return it.Node().Raw
}

// valuePosition is where a node's value starts; of some values the parser does not
// tell, then it is the key's.
func (r *reader) valuePosition(e *unstable.Node) unstable.Range {
	if raw := e.Value().Raw; raw.Length > 0 {
		return raw
	}
	return position(e)
}

// elements is where each element of a node's list starts.
func (r *reader) elements(e *unstable.Node) (all []unstable.Range) {
	for it := e.Value().Children(); it.Next(); {
		if it.Node().Kind == unstable.Comment {
			continue
		}
		raw := it.Node().Raw
		if raw.Length == 0 {
			raw = r.valuePosition(e)
		}
		all = append(all, raw)
	}
	return all
}

// foreign stands for a value of a kind that no key has. It is what an error says of it.
type foreign string

// valueOf returns a string, int64, bool, foreign or []any of these.
func valueOf(n *unstable.Node) any {
	switch n.Kind {
	case unstable.String:
		return string(n.Data)
	case unstable.Bool:
		return string(n.Data) == "true"
	case unstable.Integer:
		i, err := strconv.ParseInt(string(n.Data), 0, 64) // TOML's 0x, 0o, 0b and _ are Go's
		if err != nil {
			return foreign(n.Data)
		}
		return i
	case unstable.Array:
		list := []any{}
		for it := n.Children(); it.Next(); {
			if it.Node().Kind == unstable.Comment {
				continue
			}
			list = append(list, valueOf(it.Node()))
		}
		return list
	}
	return foreign("a fraction, date or table")
}

// didYouMean names the known word that is nearest to word, if one is near.
func didYouMean(word string, known ...string) string {
	best, near := "", 3 // two typing mistakes
	for _, k := range known {
		if d := distance(word, k); d < near {
			best, near = k, d
		}
	}
	if best == "" {
		return ""
	}
	return fmt.Sprintf(": did you mean %s?", best)
}

// distance is how many characters must be put in, taken out or changed to make b of a.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			d := diagonal
			if a[i] != b[j] {
				d++
			}
			diagonal = row[j+1]
			row[j+1] = min(d, row[j]+1, diagonal+1)
		}
	}
	return row[len(b)]
}
