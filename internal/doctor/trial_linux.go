package doctor

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/slipway-net/slipway/stack/link"
)

// trialName is argv[0] of the child.
const trialName = "slipway-doctor"

// IsTrial tells whether this process was started by Check. main asks it before
// anything else.
func IsTrial() bool { return os.Args[0] == trialName }

// Trial tries, in the namespaces it was started in, what an engine's agent does, and
// exits.
func Trial() {
	var r trialReport
	offloads, err := tryTUN()
	if err != nil {
		r.TUN, r.TUNDenied = err.Error(), errors.Is(err, errDenied)
	}
	r.Accepted, r.Refused = offloads.Accepted, offloads.Refused
	if err := tryNAT(); err != nil {
		r.NFT, r.NFTDenied = err.Error(), errors.Is(err, unix.EPERM)
		r.NFTMissing = absent(err)
	}
	r.tryKernel()
	if err := json.NewEncoder(os.Stdout).Encode(r); err != nil {
		os.Exit(1)
	}
	os.Exit(0)
}

// errDenied says that we lack CAP_NET_ADMIN in our own namespace.
var errDenied = errors.New("not permitted in a namespace of its own")

// tryTUN makes a TUN device and agrees on offloads as the daemon will.
func tryTUN() (link.Offloads, error) {
	const path = "/dev/net/tun"
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return link.Offloads{}, fmt.Errorf("open %s: %w", path, err)
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	request, err := unix.NewIfreq("slipway%d")
	if err != nil {
		return link.Offloads{}, err
	}
	request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	switch err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); {
	case errors.Is(err, unix.EPERM):
		return link.Offloads{}, errDenied
	case err != nil:
		return link.Offloads{}, fmt.Errorf("TUNSETIFF: %w", err)
	}
	const mtu = 1500
	tun, err := link.NewTUN(f, mtu)
	if err != nil {
		return link.Offloads{}, err
	}
	return tun.Offloads(), nil
}

// tryNAT loads, for each family, a chain that maps each source address to itself.
func tryNAT() error {
	conn, err := nftables.New()
	if err != nil {
		return err
	}
	for _, f := range []struct {
		family       nftables.TableFamily
		offset, size uint32 // of the source address: RFC 791 section 3.1, RFC 8200 section 3
	}{{nftables.TableFamilyIPv4, 12, 4}, {nftables.TableFamilyIPv6, 8, 16}} {
		if _, err := os.Stat("/proc/net/if_inet6"); err != nil && f.family == nftables.TableFamilyIPv6 {
			break // a kernel without IPv6
		}
		table := conn.AddTable(&nftables.Table{Name: "slipway", Family: f.family})
		chain := conn.AddChain(&nftables.Chain{
			Name: "trial", Table: table, Type: nftables.ChainTypeNAT,
			Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource,
		})
		conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: f.offset, Len: f.size},
			&expr.NAT{Type: expr.NATTypeSourceNAT, Family: uint32(f.family), RegAddrMin: 1},
		}})
		if err := conn.Flush(); err != nil {
			return err
		}
	}
	return nil
}
