package daemon

import (
	"context"
	"net/http"
	"net/netip"

	"github.com/slipway-net/slipway/internal/api"
	"github.com/slipway-net/slipway/internal/flow"
)

// Info implements api.Backend.
func (b backend) Info() api.Info {
	i := api.NewInfo()
	i.Version, i.StateDir, i.ChildPID = b.opts.Version, b.state.path, b.agent.PID()
	i.NetworkDriver.DNS = []netip.Addr{b.net.Gateway4}
	i.NetworkDriver.ChildIP = b.net.Guest4
	i.NetworkDriver.IPv6 = b.net.Guest6.IsValid()
	return i
}

// Ports implements api.Backend.
func (b backend) Ports() []api.Port { return []api.Port{} }

// AddPort implements api.PortBackend.
func (b backend) AddPort(_ context.Context, _ string, s flow.PortSpec) (api.Port, error) {
	return api.Port{}, &api.Error{Message: "publish " + s.String() + ": not available", Status: http.StatusServiceUnavailable}
}

// RemovePort implements api.PortBackend.
func (b backend) RemovePort(uint64) error {
	return &api.Error{Message: "withdraw a port: not available", Status: http.StatusNotFound}
}
