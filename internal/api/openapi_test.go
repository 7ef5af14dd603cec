package api

import (
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"gopkg.in/yaml.v3"

	"github.com/slipway-net/slipway/internal/flow"
)

// schema is what we look at of a schema in docs/openapi.yaml.
type schema struct {
	Ref        string            `yaml:"$ref"`
	Properties map[string]schema `yaml:"properties"`
	Items      *schema           `yaml:"items"`
	Required   []string          `yaml:"required"`
	Enum       []string          `yaml:"enum"`
}

// The document has every field of our types, and no other.
func TestOpenAPI(t *testing.T) {
	b, err := os.ReadFile(filepath.Join("..", "..", "docs", "openapi.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var doc struct {
		Paths      map[string]map[string]any
		Components struct{ Schemas map[string]schema }
	}
	if err := yaml.Unmarshal(b, &doc); err != nil {
		t.Fatal(err)
	}
	d := document{t, doc.Components.Schemas}
	for name, v := range map[string]any{
		"Status": Status{}, "FlowList": FlowList{}, "Flow": Flow{}, "Error": errorBody{}, "ExecRequest": ExecRequest{},
		"PortSpec": PortSpec{}, "Port": Port{}, "Info": Info{},
	} {
		d.compare(name, d.schemas[name], reflect.TypeOf(v))
	}
	routes := new(Server).routes()
	for path, methods := range doc.Paths {
		for method := range methods {
			if pattern := strings.ToUpper(method) + " " + path; routes[pattern] == nil {
				t.Errorf("%s is documented and not there", pattern)
			}
		}
	}
	for pattern := range routes {
		method, path, _ := strings.Cut(pattern, " ")
		if doc.Paths[path][strings.ToLower(method)] == nil {
			t.Errorf("%s is not documented", pattern)
		}
	}
	for where, words := range map[string][]string{
		"PortSpec.proto":    portProtos,
		"PortSpec.sourceIP": {string(flow.SourcePreserve), string(flow.SourceGateway)},
		"Flow.decision":     {string(flow.Direct), string(flow.Proxied), string(flow.ToHost), string(flow.Denied), string(flow.Refused), string(flow.Published)},
		"Flow.state":        {flow.Dialling.String(), flow.Open.String(), flow.HalfOpen.String(), flow.Closed.String()},
	} {
		name, field, _ := strings.Cut(where, ".")
		if got := d.schemas[name].Properties[field].Enum; !slices.Equal(got, words) {
			t.Errorf("%s may be %v in docs/openapi.yaml, and is one of %v", where, got, words)
		}
	}
}

type document struct {
	t       *testing.T
	schemas map[string]schema
}

func (d document) resolve(s schema) schema {
	if s.Ref != "" {
		return d.schemas[strings.TrimPrefix(s.Ref, "#/components/schemas/")]
	}
	return s
}

// compare looks at the fields of a struct, and of those below it that are ours.
func (d document) compare(where string, s schema, typ reflect.Type) {
	s = d.resolve(s)
	known := map[string]bool{}
	for _, f := range reflect.VisibleFields(typ) {
		if f.Anonymous {
			continue
		}
		name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		if name == "-" {
			continue
		}
		known[name] = true
		p, ok := s.Properties[name]
		if !ok {
			d.t.Errorf("%s.%s is not in docs/openapi.yaml", where, name)
			continue
		}
		required := false
		for _, r := range s.Required {
			required = required || r == name
		}
		if optional := strings.Contains(options, "omitempty") || where == "ExecRequest" && name != "args"; required == optional {
			d.t.Errorf("%s.%s: required is %v in docs/openapi.yaml", where, name, required)
		}
		d.below(where+"."+name, d.resolve(p), f.Type)
	}
	for name := range s.Properties {
		if !known[name] {
			d.t.Errorf("docs/openapi.yaml has %s.%s, which is not there", where, name)
		}
	}
}

func (d document) below(where string, s schema, typ reflect.Type) {
	if typ.Kind() == reflect.Slice && s.Items != nil {
		typ, s = typ.Elem(), d.resolve(*s.Items)
	}
	if typ.Kind() == reflect.Struct && typ.PkgPath() == reflect.TypeOf(Status{}).PkgPath() {
		d.compare(where, s, typ)
	}
}
