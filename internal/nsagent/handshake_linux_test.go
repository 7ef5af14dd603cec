package nsagent

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

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
