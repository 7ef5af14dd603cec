package daemon

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/slipway-net/slipway/forward/publish"
)

// A UDP client is forgotten before the guest's conntrack forgets it, and 90 s are enough.
func TestUDPIdle(t *testing.T) {
	for conntrack, want := range map[int]time.Duration{
		0: 90 * time.Second, 120: 90 * time.Second, 95: 90 * time.Second, 30: 25 * time.Second, 3: 5 * time.Second,
	} {
		if got := udpIdle(conntrack); got != want {
			t.Errorf("udpIdle(%d) = %v, expected %v", conntrack, got, want)
		}
	}
}

func TestPublishErrorStatus(t *testing.T) {
	for want, errs := range map[int][]error{
		http.StatusBadRequest:         {new(publish.SpecError), new(publish.PolicyError), syscall.EACCES, syscall.EADDRNOTAVAIL},
		http.StatusConflict:           {new(publish.ConflictError)},
		http.StatusNotFound:           {publish.ErrNotFound},
		http.StatusServiceUnavailable: {publish.ErrTooMany, net.ErrClosed, syscall.EMFILE},
		0:                             {syscall.EIO},
	} {
		for _, err := range errs {
			if got := publishError(fmt.Errorf("publish 8080:80/tcp: %w", err)); got.Status != want {
				t.Errorf("%T %v: status %d, expected %d", err, err, got.Status, want)
			}
		}
	}
}

// The guest is told where its socket is, once, and nothing of sockets that are ours.
func TestGuestEnv(t *testing.T) {
	e := &engine{state: &stateDir{path: "/run/slipway/a"}}
	env := []string{"A=1", "SLIPWAY_SOCK=/elsewhere", "LISTEN_FDS=1", "LISTEN_PID=7", "LISTEN_FDNAMES=x", "LISTEN=2"}
	want := []string{"A=1", "LISTEN=2", "SLIPWAY_SOCK=/run/slipway/a/guest.sock"}
	if got := e.guestEnv(env); !slices.Equal(got, want) || len(env) != 6 || env[1] != "SLIPWAY_SOCK=/elsewhere" {
		t.Errorf("guestEnv = %q, expected %q; given %q", got, want, env)
	}
}

// A dockerd that is there but not in PATH is found by the hint.
func TestDockerdHint(t *testing.T) {
	dir := t.TempDir()
	if got := dockerdHint(dir); !strings.HasPrefix(got, "apt-get install") {
		t.Errorf("without dockerd: %q", got)
	}
	if err := os.WriteFile(filepath.Join(dir, "dockerd"), nil, 0o755); err != nil {
		t.Fatal(err)
	}
	if got, want := dockerdHint(dir), "it is in "+dir+": export PATH=$PATH:"+dir; got != want {
		t.Errorf("with dockerd: %q, want %q", got, want)
	}
}

// Of many ports that fail some are named, and the rest are counted.
func TestSomeOf(t *testing.T) {
	var errs []error
	for i := range maxUnpublished {
		errs = append(errs, fmt.Errorf("port %d", i))
		if got := someOf(errs); len(got) != len(errs) {
			t.Errorf("%d of %d", len(got), len(errs))
		}
	}
	for i := range 3 {
		errs = append(errs, errors.New("more"))
		got := someOf(errs)
		want := fmt.Sprintf("publish: %d more ports could not be published", i+1)
		if len(got) != maxUnpublished+1 || got[maxUnpublished].Error() != want {
			t.Errorf("%d errors: %v, want %q at the end", len(errs), got, want)
		}
	}
	if errs[maxUnpublished].Error() != "more" {
		t.Error("the errors themselves were changed")
	}
}
