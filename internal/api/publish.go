package api

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"reflect"
	"strconv"
	"strings"

	"github.com/slipway-net/slipway/internal/flow"
)

// OwnerAPI owns the ports that were asked for on the control socket.
const OwnerAPI = "api"

// maxSpec is how many bytes a request for one port may have.
const maxSpec = 64 << 10

func (s *Server) info(w http.ResponseWriter, _ *http.Request) { reply(w, s.backend.Info()) }

func (s *Server) ports(w http.ResponseWriter, r *http.Request) {
	list := s.backend.Ports(r.Context())
	if list == nil {
		list = []Port{} // never null
	}
	reply(w, list)
}

func (s *Server) addPort(w http.ResponseWriter, r *http.Request) {
	b, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxSpec))
	if err != nil {
		refuse(w, unread(err))
		return
	}
	spec, err := readSpec(b)
	if err != nil {
		refuse(w, err)
		return
	}
	p, err := s.backend.AddPort(r.Context(), OwnerAPI, spec)
	if err != nil {
		refuse(w, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusCreated)
	json.NewEncoder(w).Encode(p) // an error is the client's, who has gone
}

func (s *Server) removePort(w http.ResponseWriter, r *http.Request) {
	word := r.PathValue("id")
	id, err := strconv.ParseUint(word, 10, 64)
	if err != nil {
		refuse(w, invalid("port %s: is not a number", quote(word)))
		return
	}
	if err := s.backend.RemovePort(id); err != nil {
		refuse(w, err)
	}
}

// readSpec reads and checks what somebody asks for. Unknown fields are ignored, as
// RootlessKit does. The error is an *Error.
func readSpec(b []byte) (flow.PortSpec, error) {
	var s PortSpec
	if err := decode(b, &s); err != nil {
		return flow.PortSpec{}, err
	}
	return s.Flow()
}

// decode reads the one document in b; the error is an *Error that names the field.
func decode(b []byte, v any) error {
	err := json.Unmarshal(b, v)
	if wrong := (*json.UnmarshalTypeError)(nil); errors.As(err, &wrong) {
		is, _, _ := strings.Cut(wrong.Value, " ") // "number 1.5"
		if wrong.Field == "" {
			return invalid("read request: %s where %s belongs", is, kindOf(wrong.Type))
		}
		return invalid("%s: %s where %s belongs", wrong.Field, is, kindOf(wrong.Type))
	}
	if err != nil {
		return invalid("read request: %v", err)
	}
	return nil
}

// kindOf is what JSON calls a type.
func kindOf(t reflect.Type) string {
	switch t.Kind() {
	case reflect.Int, reflect.Uint64:
		return "a whole number"
	case reflect.String:
		return "a string"
	case reflect.Bool:
		return "true or false"
	}
	return "an object"
}

// unread is why a body could not be read.
func unread(err error) *Error {
	if big := (*http.MaxBytesError)(nil); errors.As(err, &big) {
		return &Error{Message: fmt.Sprintf("read request: longer than %d bytes", big.Limit), Status: http.StatusRequestEntityTooLarge}
	}
	return invalid("read request: %v", err)
}

// refuse answers with the status that err has.
func refuse(w http.ResponseWriter, err error) {
	e := asError(err)
	status := e.Status
	if status == 0 {
		status = http.StatusInternalServerError
	}
	fail(w, status, e)
}

// quote is s for a message, of bounded length.
func quote(s string) string {
	const longest = 64
	if len(s) > longest {
		return strconv.Quote(s[:longest]) + "..."
	}
	return strconv.Quote(s)
}
