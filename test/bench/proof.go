//go:build linux

package main

import (
	"errors"
	"fmt"
	"math"
	"slices"
)

// slipwayDevice is the guest's device under slipway.
const slipwayDevice = "slipway0"

// The kernel path writes a SYN to the device and back into it, and nothing else of a
// connection. Flows that fell back to netstack need five packets or more in each
// direction, so these bounds let a few of a thousand pass: a retransmitted SYN must
// not spoil a sample. Every other connection may cause no packet at all.
const (
	kernelPackets = 1.02 // for each connection, in the busier direction
	kernelSlack   = 40   // of a few connections; neighbours and routers are looked for too
)

// proof is what a sample left behind outside the load tool's own figures.
type proof struct {
	hostNS uint64 // inode
	row    row
	guest  *guest
	report guestReport
	world  map[string]device // how far the counters in world moved
	seen   worldReport
}

// check returns what speaks against the driver having carried the load.
func (p proof) check() error {
	if p.report.Congestion != congestion {
		return fmt.Errorf("guest uses %s instead of %s", p.report.Congestion, congestion)
	}
	if p.report.NetNS == p.hostNS {
		return errors.New("the load ran in the host's network namespace")
	}
	slices.Sort(p.seen.Peers)
	source := pick(p.row.ipv6, p.guest.source6, p.guest.source)
	if peers := slices.Compact(p.seen.Peers); len(peers) != 1 || peers[0] != source.String() {
		return fmt.Errorf("world saw %v instead of %v", peers, source)
	}
	if len(p.report.Devices) != 1 {
		return fmt.Errorf("guest has %d devices besides lo instead of 1", len(p.report.Devices))
	}
	name := pick(p.guest.viaHost, "host0", "guest0")
	if err := p.carried("world", name, p.world[name]); err != nil {
		return err
	}
	if least := p.payload(); p.row.load != "bulk" && p.seen.Bytes < least {
		return fmt.Errorf("world read %d of %d bytes", p.seen.Bytes, least)
	}
	if !p.guest.bridged {
		return p.checkUplinks(p.report.Devices)
	}
	if p.report.OutsideCongestion != congestion {
		return fmt.Errorf("guest uses %s around the container instead of %s", p.report.OutsideCongestion, congestion)
	}
	for name, dev := range p.report.Devices {
		if err := p.carried("container", name, dev); err != nil {
			return err
		}
	}
	bridge, ok := p.report.OutsideDevices["docker0"]
	if !ok {
		return errors.New("guest has no bridge")
	}
	if err := p.carried("guest", "docker0", bridge); err != nil {
		return err
	}
	uplinks := make(map[string]device)
	for name, dev := range p.report.OutsideDevices {
		if name != "docker0" && name != "veth0" {
			uplinks[name] = dev
		}
	}
	return p.checkUplinks(uplinks)
}

// checkUplinks looks at the devices that lead out of the guest.
func (p proof) checkUplinks(devs map[string]device) error {
	if len(devs) != 1 {
		return fmt.Errorf("guest has %d ways out instead of 1", len(devs))
	}
	for name, dev := range devs {
		if p.guest.path != "" && name != slipwayDevice {
			return fmt.Errorf("guest's way out is %s instead of %s", name, slipwayDevice)
		}
		switch {
		case p.path() == pathKernel:
			return p.checkKernel(name, dev)
		case p.path() == pathAny:
		default:
			return p.carried("guest", name, dev)
		}
	}
	return nil
}

// path returns the path that this sample must have taken. Only TCP has a choice.
func (p proof) path() path {
	if p.row.udp {
		return pathNetstack
	}
	return p.guest.path
}

// checkKernel returns an error if more crossed the device than the SYNs.
func (p proof) checkKernel(name string, dev device) error {
	conns := p.report.Values["conns"]
	if conns < 1 {
		return errors.New("load does not tell how many connections it made")
	}
	least, most := uint64(math.Round(conns*(2-kernelPackets))), uint64(conns*kernelPackets)+kernelSlack
	busier := max(dev.RxPackets, dev.TxPackets)
	if busier > most {
		return fmt.Errorf("guest's %s counted %d packets of %.0f connections: not all took the kernel path", name, busier, conns)
	}
	if quieter := min(dev.RxPackets, dev.TxPackets); quieter < least {
		return fmt.Errorf("guest's %s counted %d packets of %.0f connections: not all are slipway's", name, quieter, conns)
	}
	return nil
}

// carried returns an error if a device has not counted the payload in its busier
// direction.
func (p proof) carried(whose, name string, dev device) error {
	if n, least := max(dev.RxBytes, dev.TxBytes), p.payload(); n < least {
		return fmt.Errorf("%s's %s counted %d of %d bytes", whose, name, n, least)
	}
	return nil
}

// payload is what must have passed in the busier direction at least.
func (p proof) payload() uint64 {
	v := p.report.Values
	return uint64(v["bytes"] + float64(p.row.payload)*max(v["n"], v["flows"]))
}
