//go:build !unix

package api

import (
	"errors"
	"net"
	"os"
)

var errNoFiles = errors.New("pass files: this system has no SCM_RIGHTS")

func sendFiles(*net.UnixConn, [3]*os.File) error { return errNoFiles }

func receiveFiles(*net.UnixConn) ([3]*os.File, error) { return [3]*os.File{}, errNoFiles }

// fileLimit is how many files we may have open: the C runtime's default.
func fileLimit() int { return 512 }
