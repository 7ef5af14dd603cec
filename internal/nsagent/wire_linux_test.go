package nsagent

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"reflect"
	"strings"
	"syscall"
	"testing"

	"github.com/moby/sys/user"
	"golang.org/x/sys/unix"
)

// wirePair returns two ends of the protocol and the raw socket of the first.
func wirePair(t testing.TB) (a, b *wire) {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ends := make([]*wire, 2)
	for i, fd := range pair {
		if ends[i], err = newWire(os.NewFile(uintptr(fd), "")); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ends[i].close() })
	}
	return ends[0], ends[1]
}

func TestWire(t *testing.T) {
	a, b := wirePair(t)
	args := []string{"", "\xff", strings.Repeat("x", 2<<20)}
	sent := make(chan error, 1)
	go func() {
		for i := range 3 {
			if err := a.send(request{ID: uint64(i), Exec: &execRequest{Args: packStrings(args)}}, os.Stdin, os.Stdout, os.Stderr); err != nil {
				sent <- err
				return
			}
			if err := a.send(request{ID: uint64(i), Signal: unix.SIGTERM}); err != nil {
				sent <- err
				return
			}
		}
		sent <- a.close()
	}()
	for i := range 3 {
		var req request
		files, err := b.receive(&req)
		if err != nil {
			t.Fatal(err)
		}
		if len(files) != 3 || req.ID != uint64(i) || !reflect.DeepEqual(unpackStrings(req.Exec.Args), args) {
			t.Errorf("message %d: %d files, ID %d", i, len(files), req.ID)
		}
		closeAll(files)
		req = request{}
		if files, err := b.receive(&req); err != nil || len(files) != 0 || req.Signal != unix.SIGTERM {
			t.Errorf("%+v, %d files, error %v", req, len(files), err)
		}
	}
	if _, err := b.receive(&request{}); err != io.EOF {
		t.Errorf("at the end: %v", err)
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
}

func TestWireBadMessages(t *testing.T) {
	head := func(size, files uint32) []byte {
		return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(nil, size), files)
	}
	for name, b := range map[string][]byte{
		"cut_header":   head(2, 0)[:5],
		"cut_body":     append(head(9, 0), "{}"...),
		"too_long":     head(maxBody+1, 0),
		"no_files":     append(head(2, 1), "{}"...),
		"not_json":     append(head(2, 0), "no"...),
		"wrong_type":   append(head(10, 0), `{"id":"x"}`...),
		"all_ones":     bytes.Repeat([]byte{0xff}, 64),
		"trailing_err": append(append(head(2, 0), "{}"...), 1),
	} {
		t.Run(name, func(t *testing.T) {
			a, b2 := wirePair(t)
			if _, err := a.conn.Write(b); err != nil {
				t.Fatal(err)
			}
			a.close()
			err := error(nil)
			for range 2 { // the last case is good at first
				if err == nil {
					_, err = b2.receive(&request{})
				}
			}
			if err == nil || err == io.EOF {
				t.Errorf("error %v", err)
			}
		})
	}
	a, _ := wirePair(t)
	if err := a.send(request{Exec: &execRequest{Args: make([]byte, maxBody)}}); !errors.Is(err, unix.E2BIG) {
		t.Errorf("a message beyond the limit: %v", err)
	}
}

// Files that nobody asked for are closed again.
func TestWireClosesFiles(t *testing.T) {
	a, b := wirePair(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := a.sendHead([]byte{0xff, 0, 0, 0, 0, 0, 0, 1}, []*os.File{w}); err != nil {
		t.Fatal(err)
	}
	w.Close()
	if files, err := b.receive(&request{}); err == nil || files != nil {
		t.Fatalf("%d files, error %v", len(files), err)
	}
	if _, err := r.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the write end is open somewhere: %v", err)
	}
}

// The agent's messages come from a process that a guest's root could take over.
func FuzzWire(f *testing.F) {
	f.Add([]byte("\x00\x00\x00\x02\x00\x00\x00\x00{}"))
	f.Add([]byte("\x00\x00\x00\x10\x00\x00\x00\x00{\"id\":1,\"x\":[]}\n"))
	f.Add([]byte("\xff\xff\xff\xff\xff\xff\xff\xff"))
	f.Fuzz(func(t *testing.T, data []byte) {
		a, b := wirePair(t)
		go func() {
			a.conn.Write(data)
			a.close()
		}()
		for {
			var ev event
			files, err := b.receive(&ev)
			closeAll(files)
			if err != nil {
				return
			}
			if ev.Failed != nil && ev.Failed.err() == nil {
				t.Error("an error that is none")
			}
		}
	})
}

func TestPackStrings(t *testing.T) {
	for _, list := range [][]string{nil, {""}, {"a"}, {"", ""}, {"a", "", "b\xff"}, {"", "a"}} {
		if got := unpackStrings(packStrings(list)); !reflect.DeepEqual(got, list) {
			t.Errorf("%q came back as %q", list, got)
		}
	}
}

// Errors keep over the wire what a caller can ask for.
func TestWireError(t *testing.T) {
	for _, err := range []error{
		errors.New("plain"),
		unix.ENOENT,
		&Error{Op: "open", On: "x", Err: unix.EPERM, Hint: "do this"},
		&Error{Op: "open", On: "x", Err: fmt.Errorf("more words: %w", unix.EPERM)},
		&Error{Op: "attach", On: "x", Err: ErrHasDefaultRoute, Hint: "h"},
		&ExecError{Code: 126, Name: "prog", Err: unix.EACCES},
		&ExecError{Code: 127, Name: "prog", Err: errors.New("not found in PATH")},
	} {
		got := wireErrorOf(err).err()
		if got.Error() != err.Error() {
			t.Errorf("%q came back as %q", err, got)
		}
		for _, target := range []error{unix.EPERM, unix.ENOENT, unix.EACCES, ErrHasDefaultRoute} {
			if errors.Is(got, target) != errors.Is(err, target) {
				t.Errorf("%q: is %v: %v", err, target, errors.Is(got, target))
			}
		}
		var a, b *Error
		if errors.As(err, &a) != errors.As(got, &b) || a != nil && a.Hint != b.Hint {
			t.Errorf("%q lost its hint", err)
		}
		var x, y *ExecError
		if errors.As(err, &x) != errors.As(got, &y) || x != nil && x.Code != y.Code {
			t.Errorf("%q lost its code", err)
		}
	}
}

func TestStatusOf(t *testing.T) {
	for ws, want := range map[syscall.WaitStatus]Status{
		0:      {},
		3 << 8: {Code: 3},
		9:      {Code: 137, Signal: unix.SIGKILL},
		0x8b:   {Code: 139, Signal: unix.SIGSEGV}, // with a core dump
	} {
		if got := statusOf(ws); got != want {
			t.Errorf("statusOf(%#x) = %+v, want %+v", ws, got, want)
		}
	}
}

func TestPingRange(t *testing.T) {
	for _, tt := range []struct {
		name   string
		gids   []user.IDMap
		lo, hi int64
	}{
		{"no_user_namespace", []user.IDMap{{ID: 0, ParentID: 0, Count: 4294967295}}, 0, maxGroup},
		{"single", []user.IDMap{{ID: 0, ParentID: 1000, Count: 1}}, 0, 0},
		{"single_other", []user.IDMap{{ID: 1000, ParentID: 1000, Count: 1}}, 1000, 1000},
		{"usual", []user.IDMap{{ID: 0, ParentID: 1000, Count: 1}, {ID: 1, ParentID: 100000, Count: 65536}}, 0, 65536},
		// In the host's numbers 0 is above the others.
		{"self_above", []user.IDMap{{ID: 0, ParentID: 300000, Count: 1}, {ID: 1, ParentID: 100000, Count: 65536}}, 1, 65536},
		{"two_ranges", []user.IDMap{
			{ID: 0, ParentID: 1000, Count: 1}, {ID: 1, ParentID: 500000, Count: 10}, {ID: 11, ParentID: 100000, Count: 20},
		}, 0, 10},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if lo, hi := pingRange(tt.gids); lo != tt.lo || hi != tt.hi {
				t.Errorf("range %d %d, want %d %d", lo, hi, tt.lo, tt.hi)
			}
		})
	}
}

func TestRangeMap(t *testing.T) {
	m := rangeMap(1000, []user.SubID{{SubID: 100000, Count: 65536}, {SubID: 300000, Count: 10}})
	if got, want := lines(m), "0 1000 1\n1 100000 65536\n65537 300000 10\n"; got != want {
		t.Errorf("mapping %q, want %q", got, want)
	}
	if m := rangeMap(1000, make([]user.SubID, 1000)); len(m) > maxExtents {
		t.Errorf("%d lines", len(m))
	}
}

func TestLookPathErrorsAreExecErrors(t *testing.T) {
	for name, code := range map[string]int{"no-such-program": 127, "/nonexistent": 127, "/etc": 126} {
		_, err := lookPath(name, "", nil)
		var x *ExecError
		if !errors.As(err, &x) || x.Code != code {
			t.Errorf("%s: %v", name, err)
		}
	}
	if path, err := lookPath("sh", "", nil); err != nil || !strings.HasSuffix(path, "/sh") {
		t.Errorf("sh is %q, %v", path, err)
	}
}

func TestDirectChildren(t *testing.T) {
	pid, err := syscall.ForkExec("/bin/sh", []string{"sh", "-c", "read x"}, &syscall.ProcAttr{Files: blockedPipe(t)})
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Wait4(pid, nil, 0, nil)
	defer syscall.Kill(pid, syscall.SIGKILL)
	for name, list := range map[string][]int{"list": directChildren(), "scan": childrenByScan()} {
		if len(list) != 1 || list[0] != pid {
			t.Errorf("%s: %v, want %d", name, list, pid)
		}
	}
}

// blockedPipe is the standard input of a process that is to wait.
func blockedPipe(t testing.TB) []uintptr {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	return []uintptr{r.Fd()}
}

func TestMountsUnescape(t *testing.T) {
	if got := unescape.Replace(`/a\040b\011c\134d`); got != "/a b\tc\\d" {
		t.Errorf("got %q", got)
	}
}

// What came with a message that we had no descriptors for is lost, and the next message is
// read as if nothing had happened.
func TestWireFilesLost(t *testing.T) {
	a, b := wirePair(t)
	before := openFDs(t)
	if err := a.send(event{ID: 7, Sockets: 3}, os.Stdin, os.Stdin, os.Stdin); err != nil {
		t.Fatal(err)
	}
	if err := a.send(event{ID: 8}); err != nil {
		t.Fatal(err)
	}
	var ev event
	var fds []int
	var err error
	withFewFDs(t, 1, func() { fds, err = b.receiveFDs(&ev) })
	if err != errFilesLost || len(fds) != 0 || ev.ID != 7 || ev.Sockets != 3 {
		t.Errorf("%+v, %d descriptors, error %v", ev, len(fds), err)
	}
	ev = event{}
	if fds, err := b.receiveFDs(&ev); err != nil || len(fds) != 0 || ev.ID != 8 {
		t.Errorf("%+v, %d descriptors, error %v", ev, len(fds), err)
	}
	if after := openFDs(t); after != before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

// A process whose number on the host was lost has started all the same, and the agent lives on.
func TestStartedFilesLost(t *testing.T) {
	ours, theirs := wirePair(t)
	a := newAgent(Spec{}, slog.New(slog.DiscardHandler))
	a.wire = ours
	var err error
	if a.proc, err = os.StartProcess("/bin/true", []string{"true"}, &os.ProcAttr{}); err != nil {
		t.Fatal(err)
	}
	p, err := a.register()
	if err != nil {
		t.Fatal(err)
	}
	if err := theirs.send(event{ID: p.id, Started: 42}, os.Stdin, os.Stdin); err != nil { // of which one is too many
		t.Fatal(err)
	}
	withFewFDs(t, 1, func() {
		a.workers.Go(a.receive)
		<-p.settled
	})
	if p.err != nil || p.PID() != 42 {
		t.Errorf("process %d, error %v", p.PID(), p.err)
	}
	theirs.close()
	a.workers.Wait()
}

// A request to an agent that has just ended says so, whatever the socket says.
func TestSendToNobody(t *testing.T) {
	ours, theirs := wirePair(t)
	a := &Agent{wire: ours}
	theirs.close()
	if err := a.send(request{Signal: unix.SIGTERM}); !errors.Is(err, ErrClosed) {
		t.Errorf("error %v, want ErrClosed", err)
	}
}

// The terminal of a command that could not be started is let go of, though nobody waits for
// the answer any more.
func TestFailedClosesTerminal(t *testing.T) {
	tty, w, err := os.Pipe() // as good as one
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	p := &Process{job: &job{tty: tty}, settled: make(chan struct{}), exited: make(chan struct{})}
	p.handle(&event{Failed: &wireError{Text: "x"}}, nil)
	if p.job.tty != nil {
		t.Error("it is open")
	}
}

// withFewFDs calls f while the process may open only few more files.
func withFewFDs(t *testing.T, few int, f func()) {
	t.Helper()
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	var free []int // the kernel gives the lowest, so all below the last one are in use
	for range few {
		fd, err := unix.FcntlInt(0, unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		free = append(free, fd)
	}
	limit := was
	limit.Cur = uint64(free[few-1] + 1)
	closeFDs(free)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &was)
	f()
}
