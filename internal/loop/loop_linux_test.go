package loop

import (
	"encoding/binary"
	"math"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is how long tests wait for what must come.
const patience = 20 * time.Second

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
		case <-time.After(patience):
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
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
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
	for range 2 { // the events are there, and come with the first or before it
		l.Do(func() {})
	}
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

// The thread goes on with others' goroutines when the loop has ended.
func TestNobodyIsInsideAfterwards(t *testing.T) {
	l, err := New()
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan bool)
	go func() {
		l.run()
		ended <- l.Inside()
	}()
	l.Close()
	if <-ended {
		t.Error("the loop has ended, and somebody is inside")
	}
}

// Close must not close what Post still writes to, whose number may be another's then.
func TestPostSignalsBeforeClose(t *testing.T) {
	l, err := New()
	if err != nil {
		t.Fatal(err)
	}
	// Post waits in write(2): there is no room.
	unix.SetNonblock(l.wake, false)
	var full [8]byte
	binary.NativeEndian.PutUint64(full[:], math.MaxUint64-1)
	unix.Write(l.wake, full[:])
	posted := make(chan bool)
	go func() { posted <- l.Post(func() {}) }()
	for end := time.Now().Add(200 * time.Millisecond); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if l.mu.TryLock() {
			n := len(l.posted)
			l.mu.Unlock()
			if n > 0 {
				t.Error("Close may go on before Post has signalled")
				break
			}
		}
	}
	unix.Read(l.wake, full[:])
	<-posted
	unix.SetNonblock(l.wake, true)
	l.Start()
	l.Close()
}
