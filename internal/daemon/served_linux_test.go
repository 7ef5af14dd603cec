package daemon

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/slipway-net/slipway/internal/nsagent"
)

// attach names the engine that serves a namespace instead of having its route removed.
func TestAttachError(t *testing.T) {
	e := bookEngine(t)
	route := &nsagent.Error{Op: "attach", On: "x", Err: nsagent.ErrHasDefaultRoute, Hint: "remove it first"}
	e.opts.PID = os.Getpid()
	if err := e.attachError(route); err != route {
		t.Errorf("a foreign route: %v", err)
	}
	other, err := openState(e.state.root, "db")
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := os.Symlink("/proc/self/ns/net", other.file("netns")); err != nil {
		t.Fatal(err)
	}
	for _, netns := range []string{"", "/proc/self/ns/net"} {
		on := netns
		if e.opts.NetNS = netns; netns == "" {
			on = fmt.Sprintf("process %d", os.Getpid())
		} else {
			e.opts.PID = 0
		}
		err := e.attachError(route)
		if want := fmt.Sprintf("attach on %s: engine db serves it already", on); err.Error() != want || strings.Contains(hintOf(err), "remove") {
			t.Errorf("%v, hint %q, expected %q", err, hintOf(err), want)
		}
	}
	if err := e.attachError(os.ErrExist); err != os.ErrExist {
		t.Errorf("another error: %v", err)
	}
	if !hasDevice(os.Getpid(), "lo") || hasDevice(os.Getpid(), "l") {
		t.Error("lo is not found, or l is")
	}
}
