package daemon

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"testing"
)

func TestLogWriter(t *testing.T) {
	var b bytes.Buffer
	l := newLogWriter(&b)
	for i := range 100 {
		fmt.Fprintf(l, "%d\n", i)
	}
	l.close()
	fmt.Fprintln(l, "late") // goes nowhere
	if got := b.String(); !strings.HasPrefix(got, "0\n1\n") || !strings.HasSuffix(got, "98\n99\n") {
		t.Errorf("written: %q", got)
	}
}

// A reader that stops reading holds nobody up, and hears what it missed.
func TestLogWriterStuck(t *testing.T) {
	r, w := io.Pipe()
	l := newLogWriter(w)
	for range 3 * logQueue {
		fmt.Fprintln(l, "line")
	}
	l.close() // gives up
	go func() { <-l.done; w.Close() }()
	b, _ := io.ReadAll(r)
	if !bytes.Contains(b, []byte("lines of this log are lost")) {
		t.Errorf("%d bytes, and nothing about what is lost", len(b))
	}
}
