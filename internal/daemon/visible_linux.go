package daemon

import (
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// beVisible lets an engine's daemon see in /proc which namespaces this process is in,
// which it wants to know of whoever connects. A program with file capabilities (setcap, for
// ports below 1024) hides that from its own user: it is not dumpable, and has capabilities
// that a daemon may not have. Whoever asks an engine needs none, so they go first; then
// being dumpable shows nothing that the user could not do anyway.
func beVisible() {
	if dumpable, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0); err != nil || dumpable == 1 || os.Geteuid() == 0 {
		return
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	_, _, errno := syscall.AllThreadsSyscall(unix.SYS_CAPSET,
		uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&none[0])), 0)
	if errno != 0 {
		return // the daemon refuses us, as it would have
	}
	unix.Prctl(unix.PR_SET_DUMPABLE, 1, 0, 0, 0)
}
