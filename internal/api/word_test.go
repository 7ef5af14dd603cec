package api

import (
	"encoding/json"
	"slices"
	"testing"
)

func TestWords(t *testing.T) {
	in := ExecRequest{Args: Words{"a", "", "ü\n\"<", "\xff\xfe", "{"}, Env: Words{"L=caf\xe9"}, Dir: "/caf\xe9"}
	b, err := json.Marshal(in)
	if err != nil {
		t.Fatal(err)
	}
	var out ExecRequest
	if err := json.Unmarshal(b, &out); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(out.Args, in.Args) || !slices.Equal(out.Env, in.Env) || out.Dir != in.Dir {
		t.Errorf("%+v became %+v by way of %s", in, out, b)
	}
	for _, bad := range []string{`[1]`, `[{"base64": "!"}]`, `[{"base65": "YQ=="}]`, `{}`, `"a"`} {
		if err := json.Unmarshal([]byte(bad), new(Words)); err == nil {
			t.Errorf("%s is taken", bad)
		}
	}
}
