package nsagent

import (
	"fmt"
	"os"
	"strings"

	"github.com/moby/sys/user"
)

// pingSysctl holds the range of groups that may open ping sockets (icmp(7)). It is
// empty in a new namespace: even root needs a raw socket for a ping then.
const pingSysctl = "/proc/sys/net/ipv4/ping_group_range"

// maxGroup is the largest group the kernel takes (net/ipv4/sysctl_net_ipv4.c,
// GID_T_MAX).
const maxGroup = 1<<31 - 1

// openPing opens ping sockets to every group of the guest.
func (g *guest) openPing(r *Report) {
	gids, err := user.ParseIDMapFile("/proc/self/gid_map")
	if err != nil {
		r.PingNote = err.Error()
		return
	}
	old, err := os.ReadFile(pingSysctl)
	if err != nil {
		r.PingNote = err.Error()
		return
	}
	lo, hi := pingRange(gids)
	text := fmt.Sprintf("%d %d", lo, hi)
	if err := os.WriteFile(pingSysctl, []byte(text), 0); err != nil {
		r.PingNote = fmt.Sprintf("%v: %s", err, text)
		return
	}
	if g.spec.Join != nil {
		// The kernel refuses an empty range where there is only one group: it stays open.
		g.undo = append(g.undo, func() { os.WriteFile(pingSysctl, old, 0) })
	}
	now, _ := os.ReadFile(pingSysctl)
	r.PingRange = strings.Join(strings.Fields(string(now)), " ")
}

// pingRange returns the ends of the range that lets in most of the mapped groups. The
// kernel compares groups as the host numbers them, and both ends must be mapped, so
// both are an end of a line of the mapping. They must be in order in both numberings.
func pingRange(gids []user.IDMap) (lo, hi int64) {
	best := int64(-1)
	for _, a := range gids {
		for _, b := range gids {
			first, last := a.ParentID, b.ParentID+b.Count-1
			if n := covered(gids, first, last); n > best && a.ID <= b.ID {
				best, lo, hi = n, a.ID, b.ID+b.Count-1
			}
		}
	}
	return min(lo, maxGroup), min(hi, maxGroup)
}

// covered counts the groups of whole lines between first and last as the host numbers
// them.
func covered(gids []user.IDMap, first, last int64) int64 {
	n := int64(0)
	for _, m := range gids {
		if m.ParentID >= first && m.ParentID+m.Count-1 <= last {
			n += m.Count
		}
	}
	return n
}
