//go:build !linux

package forward

import (
	"fmt"
	"runtime"
)

// hostPingSockets says that there are none: the daemon's ping is built on the error
// queue of Linux sockets.
type hostPingSockets struct{}

func newPingSockets() pingSockets { return hostPingSockets{} }

func (hostPingSockets) open(*ping) (pingSocket, error) {
	return nil, fmt.Errorf("%w on %s", errPingUnavailable, runtime.GOOS)
}

func (hostPingSockets) mode() PingMode {
	return PingMode{Mode: PingUnavailable, Why: "not built for " + runtime.GOOS}
}

func (hostPingSockets) close() {}
