package nsagent

import (
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// A guest without a device or a namespace is none, whatever else it sends.
func TestTakeFiles(t *testing.T) {
	file := new(os.File)
	for _, c := range []struct {
		names string
		ok    bool
	}{
		{"tun netns", true},
		{"netns nftables tun", true},
		{"listener4 probe4 listener6 probe6 netns tun nftables", true},
		{"tun", false},
		{"netns listener4", false},
		{"tun tun", false},
		{"tun netns tun", false},
		{"", false},
	} {
		names := strings.Fields(c.names)
		a := new(Agent)
		if got := a.take(names, slices.Repeat([]*os.File{file}, len(names))); got != c.ok {
			t.Errorf("%s: %v, want %v", c.names, got, c.ok)
		}
		if c.ok && (a.kernel != nil) != strings.Contains(c.names, wireListener4) || c.ok && (a.nft != nil) != strings.Contains(c.names, wireNFT) {
			t.Errorf("%s: took %+v, %v", c.names, a.kernel, a.nft)
		}
	}
}

// An agent that gave up while we mapped its users is asked why; our own error, that
// there is nobody any more, says nothing.
func TestLastWords(t *testing.T) {
	err := errors.New("no such process")
	for _, said := range []*wireError{nil, {Op: "open", On: "/dev/net/tun", Text: unix.EACCES.Error(), Errno: unix.EACCES, Hint: "do this"}} {
		ours, theirs := wirePair(t)
		proc, serr := os.StartProcess("/bin/true", []string{"true"}, &os.ProcAttr{})
		if serr != nil {
			t.Fatal(serr)
		}
		if said != nil {
			theirs.send(event{Log: &logEvent{Message: "before"}})
			theirs.send(event{Failed: said})
		}
		theirs.close()
		a := &Agent{wire: ours, proc: proc}
		got := a.lastWords(err)
		proc.Wait()
		if said == nil && got != err || said != nil && !errors.Is(got, unix.EACCES) {
			t.Errorf("said %v, got %v", said, got)
		}
	}
}
