package daemon

import "golang.org/x/sys/unix"

// wantFiles is a limit of open files that no engine reaches: TCP flows, UDP mappings and
// dials together hold fewer sockets.
const wantFiles = 1 << 20

// raiseFileLimit lets the daemon open as many files as the system allows. An ordinary
// user stays below the hard limit, where the Go runtime has put us already. It comes
// after the agent's start: the guest keeps the limits that its user chose.
func raiseFileLimit() {
	var l unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &l) != nil || l.Cur >= wantFiles {
		return
	}
	if unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: wantFiles, Max: max(l.Max, wantFiles)}) != nil {
		l.Cur = l.Max
		unix.Setrlimit(unix.RLIMIT_NOFILE, &l) // nothing is lost if it fails: doctor tells
	}
}
