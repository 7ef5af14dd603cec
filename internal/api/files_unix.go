//go:build unix

package api

import (
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"syscall"
)

// sendFiles passes three files over conn with one byte.
func sendFiles(conn *net.UnixConn, files [3]*os.File) error {
	fds := make([]int, len(files))
	for i, f := range files {
		fds[i] = int(f.Fd())
	}
	if _, _, err := conn.WriteMsgUnix([]byte{0}, syscall.UnixRights(fds...), nil); err != nil {
		return fmt.Errorf("pass files: %w", err)
	}
	return nil
}

// receiveFiles is the other end of sendFiles; the files are the caller's.
func receiveFiles(conn *net.UnixConn) (files [3]*os.File, err error) {
	var b [1]byte
	oob := make([]byte, syscall.CmsgSpace(4*4)) // one more than wanted, to notice it
	_, n, flags, _, err := conn.ReadMsgUnix(b[:], oob)
	if err != nil {
		return files, fmt.Errorf("take files: %w", err)
	}
	var fds []int
	messages, err := syscall.ParseSocketControlMessage(oob[:n])
	if err != nil {
		return files, fmt.Errorf("take files: %w", err)
	}
	for i := range messages {
		more, err := syscall.ParseUnixRights(&messages[i])
		if err == nil {
			fds = append(fds, more...)
		}
	}
	if len(fds) != len(files) || flags&syscall.MSG_CTRUNC != 0 {
		for _, fd := range fds {
			syscall.Close(fd)
		}
		return files, errors.New("take files: not three of them")
	}
	for i, fd := range fds {
		syscall.CloseOnExec(fd)
		files[i] = os.NewFile(uintptr(fd), [3]string{"stdin", "stdout", "stderr"}[i])
	}
	return files, nil
}

// fileLimit is how many files we may have open.
func fileLimit() int {
	var l syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l) != nil {
		return leastFiles
	}
	return int(min(l.Cur, math.MaxInt32)) // RLIM_INFINITY is the highest number
}

// leastFiles is POSIX's minimum of the limit, _POSIX_OPEN_MAX.
const leastFiles = 20
