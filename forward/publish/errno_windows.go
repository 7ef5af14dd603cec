package publish

import "golang.org/x/sys/windows"

// Why a socket cannot be had, in the words of Winsock.
var (
	errInUse     error = windows.WSAEADDRINUSE
	errNoAddress error = windows.WSAEADDRNOTAVAIL
	errNoFamily  error = windows.WSAEAFNOSUPPORT
	errNoFiles         = [2]error{windows.WSAEMFILE, windows.WSAENOBUFS}
)
