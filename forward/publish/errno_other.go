//go:build !windows

package publish

import "syscall"

// Why a socket cannot be had.
var (
	errInUse     error = syscall.EADDRINUSE
	errNoAddress error = syscall.EADDRNOTAVAIL
	errNoFamily  error = syscall.EAFNOSUPPORT
	errNoFiles         = [2]error{syscall.EMFILE, syscall.ENFILE}
)
