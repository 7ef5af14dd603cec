package arch

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

var (
	mdLink     = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	code       = regexp.MustCompile("`([^`]+)`")
	treePath   = regexp.MustCompile(`^(cmd|stack|forward|dns|internal|test|docs|packaging|\.ci)/[\w./@*-]*$`)
	goFile     = regexp.MustCompile(`^[\w./-]+\.go$`)
	identifier = regexp.MustCompile(`^[A-Za-z_]\w*(\.[A-Za-z_]\w*)?$`)
	notInSlug  = regexp.MustCompile(`[^\w\- ]`)
)

// document is a Markdown file: its lines, and for each whether it is in a fenced
// block and of which language.
type document struct {
	path  string
	lines []string
	fence []string // "" is prose; else the word behind ``` or "text"
}

func documents(t *testing.T) []document {
	t.Helper()
	var docs []document
	for _, p := range files(t, ".md") {
		b, err := os.ReadFile(filepath.Join(root, p))
		if err != nil {
			t.Fatal(err)
		}
		d := document{path: p, lines: strings.Split(string(b), "\n")}
		in := ""
		for _, l := range d.lines {
			if lang, isFence := strings.CutPrefix(strings.TrimSpace(l), "```"); isFence {
				d.fence = append(d.fence, "fence")
				if in != "" {
					in = ""
				} else if in = lang; in == "" {
					in = "text"
				}
				continue
			}
			d.fence = append(d.fence, in)
		}
		docs = append(docs, d)
	}
	return docs
}

// prose calls f for every line outside fenced blocks.
func (d document) prose(f func(n int, line string)) {
	for i, l := range d.lines {
		if d.fence[i] == "" {
			f(i+1, l)
		}
	}
}

// anchors returns what links into d may name, as GitHub derives it from headings.
func (d document) anchors() []string {
	var found []string
	d.prose(func(_ int, l string) {
		if strings.HasPrefix(l, "#") {
			h := strings.ToLower(strings.TrimSpace(strings.TrimLeft(l, "#")))
			found = append(found, strings.ReplaceAll(notInSlug.ReplaceAllString(h, ""), " ", "-"))
		}
	})
	return found
}

func TestLinks(t *testing.T) {
	docs := documents(t)
	anchors := make(map[string][]string)
	for _, d := range docs {
		anchors[d.path] = d.anchors()
	}
	for _, d := range docs {
		d.prose(func(n int, l string) {
			for _, m := range mdLink.FindAllStringSubmatch(l, -1) {
				if strings.Contains(m[1], "://") || strings.HasPrefix(m[1], "mailto:") {
					continue
				}
				file, anchor, _ := strings.Cut(m[1], "#")
				target := d.path
				if file != "" {
					target = path.Join(path.Dir(d.path), file)
				}
				if _, err := os.Stat(filepath.Join(root, target)); err != nil {
					t.Errorf("%s:%d: link to %s: no such file", d.path, n, m[1])
				} else if anchor != "" && !slices.Contains(anchors[target], anchor) {
					t.Errorf("%s:%d: link to %s: no such heading", d.path, n, m[1])
				}
			}
		})
	}
}

// Paths of this tree that a document names in backquotes are there.
func TestNamedFiles(t *testing.T) {
	for _, d := range documents(t) {
		d.prose(func(n int, l string) {
			for _, m := range code.FindAllStringSubmatch(l, -1) {
				if !treePath.MatchString(m[1]) {
					continue
				}
				if found, err := filepath.Glob(filepath.Join(root, m[1])); err != nil || len(found) == 0 {
					t.Errorf("%s:%d: names %s, which is not there", d.path, n, m[1])
				}
			}
		})
	}
}

// Where a line of a document names one Go file in backquotes, every identifier in
// backquotes on it (Name or Type.Method) is declared in that file.
func TestNamedFunctions(t *testing.T) {
	checked := 0
	for _, d := range documents(t) {
		d.prose(func(n int, l string) {
			var file string
			var names []string
			for _, m := range code.FindAllStringSubmatch(l, -1) {
				switch {
				case goFile.MatchString(m[1]) && treePath.MatchString(m[1]):
					if file != "" {
						return // two files: who is to say which name belongs where
					}
					file = m[1]
				case identifier.MatchString(m[1]):
					names = append(names, m[1])
				}
			}
			if file == "" || len(names) == 0 {
				return
			}
			declared := declarations(t, file)
			for _, name := range names {
				checked++
				if !slices.Contains(declared, name) {
					t.Errorf("%s:%d: %s does not declare %s", d.path, n, file, name)
				}
			}
		})
	}
	if checked == 0 {
		t.Error("no document names a function: the architecture should")
	}
}

// declarations returns the names that a file declares at top level, methods as
// Type.Method.
func declarations(t *testing.T, file string) []string {
	f, err := parser.ParseFile(token.NewFileSet(), filepath.Join(root, file), nil, parser.SkipObjectResolution)
	if err != nil {
		t.Error(err)
		return nil
	}
	var names []string
	for _, d := range f.Decls {
		switch d := d.(type) {
		case *ast.FuncDecl:
			names = append(names, receiver(d)+d.Name.Name)
		case *ast.GenDecl:
			for _, s := range d.Specs {
				switch s := s.(type) {
				case *ast.TypeSpec:
					names = append(names, s.Name.Name)
					names = append(names, interfaceMethods(s)...)
				case *ast.ValueSpec:
					for _, id := range s.Names {
						names = append(names, id.Name)
					}
				}
			}
		}
	}
	return names
}

func receiver(d *ast.FuncDecl) string {
	if d.Recv == nil {
		return ""
	}
	typ := d.Recv.List[0].Type
	if star, ok := typ.(*ast.StarExpr); ok {
		typ = star.X
	}
	if id, ok := typ.(*ast.Ident); ok {
		return id.Name + "."
	}
	return ""
}

func interfaceMethods(s *ast.TypeSpec) []string {
	i, ok := s.Type.(*ast.InterfaceType)
	if !ok {
		return nil
	}
	var names []string
	for _, m := range i.Methods.List {
		for _, id := range m.Names {
			names = append(names, s.Name.Name+"."+id.Name)
		}
	}
	return names
}
