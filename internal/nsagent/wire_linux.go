package nsagent

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// The wire between daemon and agent is a stream socketpair. A message is a header
// (length of the body in bytes and number of files, each 32 bits big endian), to
// which SCM_RIGHTS attaches the files, followed by a JSON body. A stream carries a
// body of any length where a datagram would have to fit the socket's send buffer,
// about 200 KiB, and a command line may have 2 MiB. The kernel never merges bytes
// that carry files with bytes sent before, so files arrive with their header.
const (
	wireHeader = 8
	// maxBody bounds a body in bytes: 2 MiB of arguments and environment become
	// 2.7 MiB in base64.
	maxBody = 4 << 20
	// maxFiles is the most files one message carries: new sockets. The kernel's own
	// limit is 253 (SCM_MAX_FD).
	maxFiles = 64
)

// wire is one end. One goroutine may read while any number write.
type wire struct {
	conn *net.UnixConn
	// patience bounds a send, if not zero; the message may then be cut and the
	// wire be of no more use. The daemon has some, in case the agent is stopped.
	// The agent has none: its daemon may be stopped by Ctrl-Z for hours.
	patience time.Duration
	mu       sync.Mutex // one writer at a time
}

// newWire takes over f, one end of a stream socketpair.
func newWire(f *os.File) (*wire, error) {
	defer f.Close()
	c, err := net.FileConn(f) // duplicates f
	if err != nil {
		return nil, err
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		return nil, fmt.Errorf("not a unix socket but %T", c)
	}
	return &wire{conn: u}, nil
}

// send writes one message. The files stay the caller's.
func (w *wire) send(body any, files ...*os.File) error {
	b, err := json.Marshal(body)
	if err != nil {
		return err
	}
	if len(b) > maxBody {
		return fmt.Errorf("message of %d bytes: %w", len(b), unix.E2BIG)
	}
	var head [wireHeader]byte
	binary.BigEndian.PutUint32(head[0:], uint32(len(b)))
	binary.BigEndian.PutUint32(head[4:], uint32(len(files)))
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.patience > 0 {
		w.conn.SetWriteDeadline(time.Now().Add(w.patience))
	}
	if err := w.sendHead(head[:], files); err != nil {
		return err
	}
	_, err = w.conn.Write(b)
	return err
}

// sendHead writes head with files attached. The caller must hold mu.
func (w *wire) sendHead(head []byte, files []*os.File) error {
	if len(files) == 0 {
		_, err := w.conn.Write(head)
		return err
	}
	fds := make([]int, len(files))
	for i, f := range files {
		fd, err := rawFD(f)
		if err != nil {
			return err
		}
		fds[i] = fd
	}
	n, _, err := w.conn.WriteMsgUnix(head, unix.UnixRights(fds...), nil)
	runtime.KeepAlive(files)
	if err != nil || n == len(head) {
		return err
	}
	_, err = w.conn.Write(head[n:])
	return err
}

// receive reads one message into body. The caller owns the files, which are closed
// on exec; there are none when err is not nil. It returns io.EOF at the end of the
// stream, if and only if that is between two messages.
func (w *wire) receive(body any) (files []*os.File, err error) {
	fds, err := w.receiveFDs(body)
	return filesOf(fds), err
}

// filesOf makes files of descriptors.
func filesOf(fds []int) []*os.File {
	var files []*os.File
	for _, fd := range fds {
		files = append(files, os.NewFile(uintptr(fd), "passed"))
	}
	return files
}

// errFilesLost is wrapped by receive and receiveFDs when the message has come, but we had
// no descriptor left for all of its files.
var errFilesLost = errors.New("no file descriptor left for what came with a message")

// receiveFDs is receive with bare descriptors: a File asks Go's poller to watch it.
func (w *wire) receiveFDs(body any) (fds []int, err error) {
	defer func() {
		if err != nil {
			closeFDs(fds)
			fds = nil
		}
	}()
	var head [wireHeader]byte
	var lost error
	for n := 0; n < len(head); {
		k, more, err := w.read(head[n:])
		fds = append(fds, more...)
		switch {
		case err == errFilesLost:
			lost = err
		case err != nil:
			return fds, err
		case k == 0 && n == 0:
			return fds, io.EOF
		case k == 0:
			return fds, io.ErrUnexpectedEOF
		}
		n += k
	}
	size := binary.BigEndian.Uint32(head[0:])
	if size > maxBody {
		return fds, fmt.Errorf("message of %d bytes, the limit is %d", size, maxBody)
	}
	if want := binary.BigEndian.Uint32(head[4:]); lost == nil && uint64(want) != uint64(len(fds)) {
		return fds, fmt.Errorf("message with %d files announces %d", len(fds), want)
	}
	b := make([]byte, size)
	if _, err := io.ReadFull(w.conn, b); err != nil {
		return fds, fmt.Errorf("body: %w", noEOF(err))
	}
	if err := json.Unmarshal(b, body); err != nil {
		return fds, err
	}
	return fds, lost
}

// read reads some bytes into b and the descriptors that came with them.
func (w *wire) read(b []byte) (int, []int, error) {
	oob := make([]byte, unix.CmsgSpace(maxFiles*4))
	n, oobn, flags, _, err := w.conn.ReadMsgUnix(b, oob) // sets MSG_CMSG_CLOEXEC
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, unix.ECONNRESET):
		return 0, nil, nil // the other end is gone; a reset if it had not read everything
	case err != nil:
		return 0, nil, err
	}
	var fds []int
	cmsgs, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return n, nil, err
	}
	for i := range cmsgs {
		more, err := unix.ParseUnixRights(&cmsgs[i])
		if err != nil {
			continue // another kind of control message
		}
		fds = append(fds, more...)
	}
	if flags&unix.MSG_CTRUNC != 0 {
		return n, fds, errFilesLost // or more than maxFiles, which nobody sends
	}
	return n, fds, nil
}

func (w *wire) close() error { return w.conn.Close() }

// rawFD returns the descriptor of f, valid while f is kept alive and open. File.Fd
// would make the open file blocking, for everybody who has it.
func rawFD(f *os.File) (int, error) {
	c, err := f.SyscallConn()
	if err != nil {
		return -1, err
	}
	n := -1
	err = c.Control(func(fd uintptr) { n = int(fd) })
	return n, err
}

// noEOF turns the end of the stream inside a message into an error.
func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// closeAll closes files, of which some may be nil.
func closeAll(files []*os.File) {
	for _, f := range files {
		if f != nil {
			f.Close()
		}
	}
}
