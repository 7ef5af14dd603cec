package arch

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const (
	root = "../.."

	// maxLines is where a file stops being one topic. The house measure is half
	// of it.
	maxLines = 800
)

// files returns the paths below root, with "/", that end in one of the suffixes.
// Build results and what belongs to git are left out.
func files(t *testing.T, suffixes ...string) []string {
	t.Helper()
	var found []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && slices.Contains([]string{".git", "bin", "testdata"}, d.Name()) {
			return filepath.SkipDir
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		if slices.ContainsFunc(suffixes, func(s string) bool { return strings.HasSuffix(path, s) }) {
			found = append(found, filepath.ToSlash(rel))
		}
		return nil
	})
	if err != nil || len(found) == 0 {
		t.Fatalf("%d files with %q, %v", len(found), suffixes, err)
	}
	return found
}

// sources parses every Go file that is no test, by folder and for all operating
// systems at once.
func sources(t *testing.T) (*token.FileSet, map[string]map[string]*ast.File) {
	t.Helper()
	fset := token.NewFileSet()
	dirs := make(map[string]map[string]*ast.File)
	for _, path := range files(t, ".go") {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(fset, filepath.Join(root, path), nil, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			t.Error(err)
			continue
		}
		dir, name := filepath.Split(path)
		if dirs[dir] == nil {
			dirs[dir] = make(map[string]*ast.File)
		}
		dirs[dir][name] = f
	}
	return fset, dirs
}

func TestPackageComments(t *testing.T) {
	_, dirs := sources(t)
	for dir, in := range dirs {
		var commented []string
		var name string
		for file, f := range in {
			name = f.Name.Name
			if f.Doc != nil {
				commented = append(commented, file)
			}
		}
		folder := filepath.Base(dir)
		if len(commented) != 1 {
			t.Errorf("%s: package comments in %q, want exactly one file with one", dir, commented)
		} else if c := commented[0]; c != name+".go" && c != folder+".go" && c != "doc.go" {
			t.Errorf("%s: the package comment is in %s, want it in %s.go or doc.go", dir, c, name)
		}
	}
}

// What a package exports has a comment: a group of constants or variables as a
// whole, or each of them.
func TestExportedAreDocumented(t *testing.T) {
	fset, dirs := sources(t)
	for _, in := range dirs {
		for _, f := range in {
			if f.Name.Name == "main" {
				continue
			}
			for _, d := range f.Decls {
				for _, id := range undocumented(d) {
					t.Errorf("%v: %s has no comment", fset.Position(id.Pos()), id.Name)
				}
			}
		}
	}
}

func undocumented(d ast.Decl) []*ast.Ident {
	switch d := d.(type) {
	case *ast.FuncDecl:
		if d.Doc == nil && d.Name.IsExported() && (d.Recv == nil || receiverExported(d.Recv)) {
			return []*ast.Ident{d.Name}
		}
	case *ast.GenDecl:
		var missing []*ast.Ident
		for _, s := range d.Specs {
			switch s := s.(type) {
			case *ast.TypeSpec:
				if d.Doc == nil && s.Doc == nil && s.Name.IsExported() {
					missing = append(missing, s.Name)
				}
			case *ast.ValueSpec:
				for _, n := range s.Names {
					if d.Doc == nil && s.Doc == nil && s.Comment == nil && n.IsExported() {
						missing = append(missing, n)
					}
				}
			}
		}
		return missing
	}
	return nil
}

func receiverExported(recv *ast.FieldList) bool {
	typ := recv.List[0].Type
	if star, ok := typ.(*ast.StarExpr); ok {
		typ = star.X
	}
	if generic, ok := typ.(*ast.IndexExpr); ok {
		typ = generic.X
	}
	id, ok := typ.(*ast.Ident)
	return ok && id.IsExported()
}

func TestFileLength(t *testing.T) {
	for _, path := range files(t, ".go", ".sh") {
		b, err := os.ReadFile(filepath.Join(root, path))
		if err != nil {
			t.Error(err)
		}
		if n := strings.Count(string(b), "\n"); n > maxLines {
			t.Errorf("%s has %d lines, more than %d: one topic per file", path, n, maxLines)
		}
	}
}

// A test that calls long is left out of `make test` and run by `make test-long`,
// which know it by its name.
func TestNamesOfLongTests(t *testing.T) {
	for _, path := range files(t, "_test.go") {
		fset := token.NewFileSet()
		f, err := parser.ParseFile(fset, filepath.Join(root, path), nil, parser.SkipObjectResolution)
		if err != nil {
			t.Error(err)
			continue
		}
		for _, d := range f.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok || !strings.HasPrefix(fn.Name.Name, "Test") || strings.HasPrefix(fn.Name.Name, "TestLong") {
				continue
			}
			ast.Inspect(fn, func(n ast.Node) bool {
				if call, ok := n.(*ast.CallExpr); ok {
					if id, ok := call.Fun.(*ast.Ident); ok && id.Name == "long" {
						t.Errorf("%v: %s calls long and is not named TestLong...", fset.Position(fn.Pos()), fn.Name.Name)
					}
				}
				return true
			})
		}
	}
}
