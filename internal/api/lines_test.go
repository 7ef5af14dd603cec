package api

import (
	"bytes"
	"errors"
	"io"
	"testing"
	"testing/iotest"
)

// However lines come in, they are what was sent, up to the first that is refused.
func FuzzLines(f *testing.F) {
	f.Add([]byte("a\n\nb\n"), byte(1))
	f.Add(append(bytes.Repeat([]byte("x"), shortLine), "\ny\n"...), byte(0))
	f.Add(append(bytes.Repeat([]byte("x"), maxLine-1), "\ny\n"...), byte(2))
	f.Add(append(bytes.Repeat([]byte("x"), maxLine), "\ny\n"...), byte(0))
	f.Add(bytes.Repeat([]byte("x\n"), maxLine), byte(0))
	f.Fuzz(func(t *testing.T, b []byte, way byte) {
		var from io.Reader = bytes.NewReader(b)
		switch way % 3 {
		case 1:
			from = iotest.OneByteReader(from)
		case 2:
			from = iotest.DataErrReader(from)
		}
		var long longLines
		in := newLines(from, &long)
		rest := b
		for {
			line, err := in.next()
			want, after, ended := bytes.Cut(rest, []byte("\n"))
			if err != nil {
				if refused := (*Error)(nil); errors.As(err, &refused) != (len(want) >= maxLine) || err == io.EOF && ended {
					t.Fatalf("%v before %d bytes", err, len(want))
				}
				break
			}
			if !ended || !bytes.Equal(line, want) {
				t.Fatalf("line %q, want %q", line, want)
			}
			if long.n > 1 || in.isLong != (long.n == 1) {
				t.Fatalf("%d long lines", long.n)
			}
			rest = after
		}
		if in.close(); long.n != 0 {
			t.Fatalf("%d long lines at the end", long.n)
		}
	})
}
