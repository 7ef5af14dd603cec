package nsagent

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// setup makes the guest what the spec says. The caller owns the files, by their names on
// the wire.
func (g *guest) setup() (files map[string]*os.File, r Report, err error) {
	if g.spec.Join != nil {
		if err := g.refuseDefaultRoute(); err != nil {
			return nil, r, err
		}
	}
	tun, err := g.network(&r)
	if err != nil {
		return nil, r, err
	}
	defer func() {
		if err != nil {
			tun.Close()
		}
	}()
	if g.spec.Rootless {
		if err = g.awaitMapping(); err != nil {
			return nil, r, fmt.Errorf("wait for the mapping: %w", err)
		}
	}
	if g.spec.Join == nil {
		if err = g.mounts(&r); err != nil {
			return nil, r, err
		}
	}
	if g.spec.PingRange {
		g.openPing(&r)
	}
	k := g.prepareKernel(&r)
	g.loadTables(&r, k)
	g.settleKernel(k, &r)
	g.settlePorts(&r)
	files = k.files()
	files[wireTUN], files[wireNFT] = tun, g.tables.owner()
	for name, family := range map[string]int{wireRoutes: unix.NETLINK_ROUTE, wireDiag: unix.NETLINK_INET_DIAG} {
		if fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, family); err == nil {
			files[name] = os.NewFile(uintptr(fd), name)
		}
	}
	return files, r, nil
}
