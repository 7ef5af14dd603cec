package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"
)

// Theory of operation.
//
// Three doors, each closed by default:
//
//   - the socket has mode 0600 in a directory of mode 0700: other users do not get in;
//   - admit (peer_linux.go) asks the kernel who connected, and refuses whoever is
//     another user or sits in other namespaces than we do: an engine may share our
//     user and see our files;
//   - guard refuses what a browser, or a program tricked into a request, would send:
//     Origin, Referer or Sec-Fetch headers, and any Host but ours.
//
// A refused connection gets an HTTP answer, so that a client can say why.
//
// Many may ask at once: connections are accepted as they come and wait in a queue for
// one of maxConns turns (listener.go). Each carries one request, so that nobody keeps a
// turn who has nothing to ask, and has deadlines, so that nobody does who does not
// read or write.

// Host is the Host header of a valid request; the socket is chosen by path, so any
// name would do, and one fixed name keeps others out.
const Host = "slipway.internal"

// rootlessKitHost is what RootlessKit's clients send in its place.
const rootlessKitHost = "rootlesskit"

// Limits of the server. The owner is trusted; they stop accidents.
const (
	maxBody       = 4 << 20          // of a request: the environment of an exec, Linux allows 2 MiB
	maxConns      = 256              // answered at one time
	headerTimeout = 10 * time.Second // for a request's header
	readTimeout   = 20 * time.Second // for all of it
	writeTimeout  = 30 * time.Second // for the answer, from the header's end on
	maxFlows      = 100_000          // listed at one time
)

// Server serves one engine's Backend.
type Server struct {
	backend Backend
	log     *slog.Logger
	http    http.Server

	running sync.RWMutex // read by every request while it runs; guards ended
	ended   bool
}

// NewServer makes a Server. log may be nil.
func NewServer(b Backend, log *slog.Logger) *Server {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	s := &Server{backend: b, log: log.With(slog.String("component", "api"))}
	mux := http.NewServeMux()
	for pattern, handler := range s.routes() {
		mux.HandleFunc(pattern, handler)
	}
	s.http = http.Server{
		Handler:           s.guard(mux),
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      writeTimeout,
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
		ConnContext:       withPeer,
	}
	s.http.SetKeepAlivesEnabled(false)
	return s
}

// routes are what docs/openapi.yaml describes.
func (s *Server) routes() map[string]http.HandlerFunc {
	return map[string]http.HandlerFunc{
		"GET /v1/status":        s.status,
		"GET /v1/flows":         s.flows,
		"POST /v1/exec":         s.exec,
		"GET /v1/info":          s.info,
		"GET /v1/ports":         s.ports,
		"POST /v1/ports":        s.addPort,
		"DELETE /v1/ports/{id}": s.removePort,
	}
}

// Serve answers on ln until ctx ends or ln fails, closes ln, and returns after the
// last request and the last exec. It returns nil if and only if ctx ended. A Server
// serves once.
func (s *Server) Serve(ctx context.Context, ln *net.UnixListener) error {
	s.http.BaseContext = func(net.Listener) context.Context { return ctx }
	stop := context.AfterFunc(ctx, func() { s.http.Close() })
	defer stop()
	err := s.http.Serve(limit(ln, maxConns, s.log))
	s.http.Close()
	s.running.Lock()
	s.ended = true
	s.running.Unlock()
	if ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("serve api on %v: %w", ln.Addr(), err)
}

// guard refuses what does not come from a client of ours.
func (s *Server) guard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.running.RLock()
		defer s.running.RUnlock()
		if s.ended {
			return
		}
		if err := admit(r.Context()); err != nil {
			level, hint := slog.LevelWarn, ""
			if isInside(err) { // who asked is told, on the same terminal as a rule
				level, hint = slog.LevelDebug, "slipway's commands are for the host; inside an engine there is the socket in SLIPWAY_SOCK"
			}
			s.log.Log(r.Context(), level, "connection refused", slog.Any("err", err))
			fail(w, http.StatusForbidden, &Error{Message: err.Error(), Hint: hint})
			return
		}
		for _, h := range []string{"Origin", "Referer", "Sec-Fetch-Site", "Sec-Fetch-Mode"} {
			if r.Header.Get(h) != "" {
				fail(w, http.StatusForbidden, &Error{Message: "requests of browsers are not answered: header " + h})
				return
			}
		}
		if r.Host != Host && r.Host != rootlessKitHost {
			fail(w, http.StatusForbidden, &Error{Message: fmt.Sprintf("host %q is not %s", r.Host, Host)})
			return
		}
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		next.ServeHTTP(w, r)
	})
}

func (s *Server) status(w http.ResponseWriter, _ *http.Request) { reply(w, s.backend.Status()) }

func (s *Server) flows(w http.ResponseWriter, r *http.Request) {
	n := maxFlows
	if q := r.URL.Query().Get("limit"); q != "" {
		var err error
		if n, err = strconv.Atoi(q); err != nil || n < 1 || n > maxFlows {
			fail(w, http.StatusBadRequest, &Error{Message: fmt.Sprintf("limit %q: must be a number in 1..%d", q, maxFlows)})
			return
		}
	}
	all := s.backend.Flows()
	list := FlowList{Flows: make([]Flow, 0, min(n, len(all))), Total: len(all)}
	for _, f := range all[:min(n, len(all))] {
		list.Flows = append(list.Flows, flowOf(f))
	}
	reply(w, list)
}

func reply(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(v) // an error is the client's, who has gone
}

func fail(w http.ResponseWriter, status int, e *Error) {
	body := errorBody{Error: e, Text: e.Message}
	if e.Hint != "" {
		body.Text += "; hint: " + e.Hint
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(body)
}

// asError makes an Error of any error.
func asError(err error) *Error {
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	return &Error{Message: err.Error()}
}
