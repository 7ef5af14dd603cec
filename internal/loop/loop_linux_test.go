package loop

import (
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func newLoop(t *testing.T) *Loop {
	t.Helper()
	l, err := New()
	if err != nil {
		t.Fatal(err)
	}
	l.Start()
	t.Cleanup(l.Close)
	return l
}

// newPipe returns both ends of a pipe that does not block.
func newPipe(t *testing.T) (r, w int) {
	t.Helper()
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_NONBLOCK|unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(p[0]); unix.Close(p[1]) })
	return p[0], p[1]
}

func TestHandlerIsCalledPerEdge(t *testing.T) {
	l := newLoop(t)
	r, w := newPipe(t)
	calls := make(chan uint32, 10)
	l.Do(func() {
		if _, err := l.Add(r, Readable, HandlerFunc(func(ev uint32) bool { calls <- ev; return false })); err != nil {
			t.Error(err)
		}
	})
	for range 3 {
		unix.Write(w, []byte{1})
		select {
		case ev := <-calls:
			if ev&Readable == 0 {
				t.Fatalf("events %#x", ev)
			}
		case <-time.After(5 * time.Second):
			t.Fatal("the handler was not called")
		}
	}
	select {
	case ev := <-calls:
		t.Errorf("called once more, with %#x", ev)
	case <-time.After(20 * time.Millisecond):
	}
}

func TestAgainLetsOthersHaveTheirTurn(t *testing.T) {
	l := newLoop(t)
	r1, w1 := newPipe(t)
	r2, w2 := newPipe(t)
	var greedy int
	other := make(chan int, 1)
	l.Do(func() {
		l.Add(r1, Readable, HandlerFunc(func(uint32) bool { greedy++; return greedy < 1000 }))
		l.Add(r2, Readable, HandlerFunc(func(uint32) bool { other <- greedy; return false }))
		unix.Write(w1, []byte{1})
		unix.Write(w2, []byte{1})
	})
	if at := <-other; at > 2 {
		t.Errorf("the other had its turn after %d calls", at)
	}
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		var n int
		l.Do(func() { n = greedy })
		if n == 1000 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("%d calls instead of 1000", n)
		}
	}
}

// TestForgottenInTheSameBatch has two descriptors become ready at once, of which the
// first removes the second and gives its place to a third.
func TestForgottenInTheSameBatch(t *testing.T) {
	l := newLoop(t)
	r1, w1 := newPipe(t)
	r2, w2 := newPipe(t)
	r3, _ := newPipe(t)
	var wrong atomic.Int32
	var refs [2]Ref
	fds := [2]int{r1, r2}
	l.Do(func() {
		for i := range refs {
			refs[i], _ = l.Add(fds[i], Readable, HandlerFunc(func(uint32) bool {
				o := 1 - i
				if refs[o] == (Ref{}) {
					wrong.Add(1) // we had been removed
					return false
				}
				l.Remove(fds[o], refs[o])
				refs[i] = Ref{}
				if ref, err := l.Add(r3, Readable, HandlerFunc(func(uint32) bool { wrong.Add(1); return false })); err != nil || ref.slot != refs[o].slot {
					t.Errorf("slot %d is not used again: %d, %v", refs[o].slot, ref.slot, err)
				}
				return false
			}))
		}
		unix.Write(w1, []byte{1})
		unix.Write(w2, []byte{1})
	})
	time.Sleep(20 * time.Millisecond)
	l.Do(func() {})
	if n := wrong.Load(); n != 0 {
		t.Errorf("%d calls for a descriptor that was removed", n)
	}
}

func TestDoAndPostAfterClose(t *testing.T) {
	l, err := New()
	if err != nil {
		t.Fatal(err)
	}
	l.Start()
	var ran bool
	l.Post(func() { ran = true })
	l.Close()
	if !ran {
		t.Error("what was posted before Close did not run")
	}
	if l.Post(func() {}) || l.Do(func() {}) {
		t.Error("a closed loop takes functions")
	}
	l.Close() // may be repeated
}

func TestInside(t *testing.T) {
	l := newLoop(t)
	var inside bool
	l.Do(func() { inside = l.Inside() })
	if !inside || l.Inside() {
		t.Errorf("inside: %v, outside: %v", inside, l.Inside())
	}
}

// TestSpinEnds checks that a loop with nothing to do uses no processor.
func TestSpinEnds(t *testing.T) {
	l := newLoop(t)
	r, w := newPipe(t)
	l.Do(func() { l.Add(r, Readable, HandlerFunc(func(uint32) bool { return false })) })
	for range 1000 {
		unix.Write(w, []byte{1})
	}
	var before, after unix.Rusage
	time.Sleep(5 * time.Millisecond)
	unix.Getrusage(unix.RUSAGE_SELF, &before)
	time.Sleep(200 * time.Millisecond)
	unix.Getrusage(unix.RUSAGE_SELF, &after)
	if used := after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano(); used > int64(50*time.Millisecond) {
		t.Errorf("an idle loop used %v in 200 ms", time.Duration(used))
	}
}
