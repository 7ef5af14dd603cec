package nsagent

import (
	"fmt"
	"os"
)

// setup makes the guest what the spec says. The caller owns the TUN.
func (g *guest) setup() (tun *os.File, r Report, err error) {
	if g.spec.Join != nil {
		if err := g.refuseDefaultRoute(); err != nil {
			return nil, r, err
		}
	}
	tun, err = g.network(&r)
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
	if g.spec.IdentitySNAT {
		g.identitySNAT(&r)
	}
	return tun, r, nil
}
