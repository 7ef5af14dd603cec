package api

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"
)

// pipes are files to run a command with, and the test's ends of them.
type pipes struct {
	files      [3]*os.File
	in         *os.File
	out        *os.File
	outOfFiles func()
}

func newPipes(t *testing.T) *pipes {
	t.Helper()
	inR, inW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	outR, outW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	p := &pipes{files: [3]*os.File{inR, outW, outW}, in: inW, out: outR}
	p.outOfFiles = func() { inR.Close(); outW.Close() }
	t.Cleanup(func() { p.outOfFiles(); inW.Close(); outR.Close() })
	return p
}

func TestExec(t *testing.T) {
	c := client(t, serve(t, new(fake)))
	p := newPipes(t)
	io.WriteString(p.in, "hello\n")
	p.in.Close()
	code, err := c.Exec(t.Context(), ExecRequest{
		Args: []string{"sh", "-c", "cat; echo $A; pwd; exit 5"}, Env: []string{"A=b"}, Dir: "/",
	}, p.files, nil)
	if err != nil || code != 5 {
		t.Fatalf("Exec = %d, %v", code, err)
	}
	p.outOfFiles()
	if out, _ := io.ReadAll(p.out); string(out) != "hello\nb\n/\n" {
		t.Errorf("output %q", out)
	}
}

func TestExecPassesSignals(t *testing.T) {
	c := client(t, serve(t, new(fake)))
	p := newPipes(t)
	signals := make(chan os.Signal, 1)
	go func() {
		p.out.Read(make([]byte, 16)) // it is ready
		signals <- syscall.SIGUSR1
	}()
	code, err := c.Exec(t.Context(), ExecRequest{
		Args: []string{"sh", "-c", "trap 'exit 9' USR1; echo ready; while :; do sleep 0.01; done"}, Env: os.Environ(),
	}, p.files, signals)
	if err != nil || code != 9 {
		t.Errorf("Exec = %d, %v", code, err)
	}
}

func TestExecClientGoes(t *testing.T) {
	c := client(t, serve(t, new(fake)))
	p := newPipes(t)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		p.out.Read(make([]byte, 16))
		cancel()
	}()
	_, err := c.ExecStarted(ctx, ExecRequest{
		Args: []string{"sh", "-c", "trap 'echo hup; exit' HUP; echo ready; while :; do sleep 0.01; done"}, Env: os.Environ(),
	}, p.files, nil, p.outOfFiles)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("Exec = %v", err)
	}
	p.out.SetReadDeadline(time.Now().Add(30 * time.Second))
	if out, err := io.ReadAll(p.out); err != nil || !strings.Contains(string(out), "hup") {
		t.Errorf("the command got no HUP: %q, %v", out, err)
	}
}

func TestExecRefused(t *testing.T) {
	want := &Error{Message: "exec on nosuch: not found", Hint: "look for it", Code: 127}
	c := client(t, serve(t, &fake{refuse: want}))
	_, err := c.Exec(t.Context(), ExecRequest{Args: []string{"nosuch"}}, newPipes(t).files, nil)
	var e *Error
	if !errors.As(err, &e) || e.Message != want.Message || e.Hint != want.Hint || e.Code != want.Code {
		t.Errorf("Exec = %v, want %v", err, want)
	}
	if _, err := c.Exec(t.Context(), ExecRequest{}, newPipes(t).files, nil); err == nil || !strings.Contains(err.Error(), "no command") {
		t.Errorf("Exec of nothing = %v", err)
	}
}

// A client that passes something else than three files gets nothing, and no file stays
// open here.
func TestWrongFiles(t *testing.T) {
	for _, n := range []int{0, 1, 2, 4, 200} {
		fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		ours, theirs := unixConn(t, fds[0]), unixConn(t, fds[1])
		before := openFiles(t)
		var rights []byte
		if n > 0 {
			list := make([]int, n)
			for i := range list {
				list[i] = int(os.Stdin.Fd())
			}
			rights = syscall.UnixRights(list...)
		}
		if _, _, err := theirs.WriteMsgUnix([]byte{0}, rights, nil); err != nil {
			t.Fatal(err)
		}
		if _, err := receiveFiles(ours); err == nil {
			t.Errorf("%d files were taken", n)
		}
		if after := openFiles(t); after != before {
			t.Errorf("%d files: %d are open after, %d before", n, after, before)
		}
	}
}

func unixConn(t *testing.T, fd int) *net.UnixConn {
	t.Helper()
	f := os.NewFile(uintptr(fd), "socket")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.(*net.UnixConn)
}

func openFiles(t *testing.T) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}
