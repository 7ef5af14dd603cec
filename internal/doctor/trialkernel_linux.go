package doctor

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// kernelTrials try the parts of the kernel path by their names in kernelParts, in IPv4: a
// kernel that has a part has it for both families, or no IPv6.
var kernelTrials = map[string]func() error{
	"tproxy": func() error {
		return tryRule(nftables.ChainTypeFilter, nftables.ChainHookPrerouting,
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
			&expr.Immediate{Register: 1, Data: []byte{127, 0, 0, 1}},
			&expr.Immediate{Register: 2, Data: binary.BigEndian.AppendUint16(nil, 1)},
			&expr.TProxy{Family: unix.NFPROTO_IPV4, TableFamily: unix.NFPROTO_IPV4, RegAddr: 1, RegPort: 2})
	},
	"socket": func() error {
		return tryRule(nftables.ChainTypeFilter, nftables.ChainHookPrerouting,
			&expr.Socket{Key: expr.SocketKeyTransparent, Register: 1})
	},
	"fib": func() error {
		return tryRule(nftables.ChainTypeFilter, nftables.ChainHookPrerouting,
			&expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true})
	},
	"conntrack": func() error {
		return tryRule(nftables.ChainTypeRoute, nftables.ChainHookOutput,
			&expr.Ct{Key: expr.CtKeyDIRECTION, Register: 1})
	},
	"ip rule":             tryMark,
	"transparent sockets": tryTransparent,
}

// tryKernel tries all parts and sets what is lacking.
func (r *trialReport) tryKernel() {
	for _, p := range kernelParts {
		err := kernelTrials[p.name]()
		switch {
		case absent(err):
			r.KernelLacks = append(r.KernelLacks, p.name)
		case err != nil && r.Kernel == "":
			r.Kernel = fmt.Sprintf("%s: %v", p.name, err)
		}
	}
}

// absent tells whether the kernel does not have what was asked for.
func absent(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EOPNOTSUPP) ||
		errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.ENOPROTOOPT)
}

// tryRule loads a chain with one rule.
func tryRule(typ nftables.ChainType, hook *nftables.ChainHook, exprs ...expr.Any) error {
	conn, err := nftables.New()
	if err != nil {
		return err
	}
	table := conn.AddTable(&nftables.Table{Name: "slipway", Family: nftables.TableFamilyIPv4})
	chain := conn.AddChain(&nftables.Chain{
		Name: "kernel" + string(typ), Table: table, Type: typ, Hooknum: hook, Priority: nftables.ChainPriorityMangle,
	})
	conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: exprs})
	return conn.Flush()
}

// tryMark has marked packets looked up in a table of their own.
func tryMark() error {
	rule := netlink.NewRule()
	rule.Family, rule.Mark, rule.Table, rule.Priority = unix.AF_INET, 0x1000, 7965, 100
	return netlink.RuleAdd(rule)
}

// tryTransparent makes a socket that may have any address.
func tryTransparent() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_TRANSPARENT, 1)
}
