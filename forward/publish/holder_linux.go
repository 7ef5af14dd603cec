package publish

// Who has a port. Three questions to /proc: which socket has an address
// (net/tcp, net/tcp6, net/udp, net/udp6: address, state, user, inode), which process has
// that inode among its descriptors (PID/fd/N is a link to socket:[INODE]), and what it is
// called (PID/comm). The second costs a readlink for every descriptor of every process,
// so the answers to the first two are kept for a second, and looking for them ends after
// 200 ms with what is known then. Not found are: the process of another user, unless we
// are root, of which the user is named; a TCP socket that is bound and does not listen; and
// whatever another /proc than ours would show.

import (
	"bufio"
	"cmp"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/slipway-net/slipway/internal/flow"
)

const (
	holdersAge    = time.Second            // how long a scan is good for
	holdersBudget = 200 * time.Millisecond // how long a scan takes at most

	// holdersMiss is how long a scan is good for a port that is not in it, in times of what
	// it took: ports that nobody can be found for cost a fifth of a CPU at most.
	holdersMiss = 4

	// tableRows is how much is read of one table. Listeners come first in those of
	// TCP; what follows are connections, which are in the way of a listener only
	// where they have its very port.
	tableRows = 20_000
)

// holders tells who has a port. The zero value is ready, and safe for concurrent use.
type holders struct {
	proc   string        // where /proc is, for tests; "" is /proc
	budget time.Duration // how long a scan takes at most, for tests; 0 is holdersBudget

	mu   sync.Mutex // held during a scan: whoever comes meanwhile wants its result
	last *holderScan
}

// holderScan is what one look at /proc has shown.
type holderScan struct {
	at    time.Time // when it began
	took  time.Duration
	rows  map[portKey][]socketRow
	files map[uint64]holderFile // by inode
}

// socketRow is one line of a table of sockets.
type socketRow struct {
	local  netip.AddrPort
	listen bool // TCP: listens. UDP: is not connected
	uid    uint32
	inode  uint64 // 0 for a socket that no process has any more
}

// holderFile is a descriptor that is a socket.
type holderFile struct {
	pid int
	fd  string
}

// find tells who keeps a socket from being bound to at; nil if nobody is found.
func (h *holders) find(proto flow.Proto, at netip.AddrPort) Holder {
	h.mu.Lock()
	defer h.mu.Unlock()
	for try := range 2 {
		if h.last == nil || time.Since(h.last.at) > holdersAge || try > 0 && time.Since(h.last.at) > (1+holdersMiss)*h.last.took {
			h.last = h.scan(cmp.Or(h.budget, holdersBudget))
		}
		if row, ok := h.last.match(proto, at); ok {
			if who := h.who(row); who != nil {
				return who
			}
		}
	}
	return nil
}

// match returns the row most likely in the way of at.
func (s *holderScan) match(proto flow.Proto, at netip.AddrPort) (best socketRow, ok bool) {
	most := 0
	for _, r := range s.rows[portKey{proto, at.Port()}] {
		a := r.local.Addr()
		rank := 0
		switch {
		case Overlap(a, at.Addr().WithZone("")):
			rank = 2
		case at.Addr().Is4() && a == any6: // may be a socket of both families
			rank = 1
		default:
			continue
		}
		if r.listen {
			rank += 2
		}
		if rank > most {
			most, best = rank, r
		}
	}
	return best, most > 0
}

// who is the owner of a row, nil if that is another now.
func (h *holders) who(r socketRow) Holder {
	f, ok := h.last.files[r.inode]
	if !ok {
		return User{r.uid, !r.listen}
	}
	if link, err := os.Readlink(h.path(strconv.Itoa(f.pid), "fd", f.fd)); err != nil || link != socketLink(r.inode) {
		return nil
	}
	comm, err := os.ReadFile(h.path(strconv.Itoa(f.pid), "comm"))
	if err != nil {
		return nil
	}
	return Process{printable(string(comm)), f.pid, !r.listen}
}

// printable is a process' name of itself, in one line without surprises.
func printable(comm string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, strings.TrimSuffix(comm, "\n"))
}

func (h *holders) path(elem ...string) string {
	root := h.proc
	if root == "" {
		root = "/proc"
	}
	return filepath.Join(append([]string{root}, elem...)...)
}

func socketLink(inode uint64) string { return fmt.Sprintf("socket:[%d]", inode) }

// scan looks at /proc, for a while.
func (h *holders) scan(budget time.Duration) *holderScan {
	s := &holderScan{at: time.Now(), rows: make(map[portKey][]socketRow), files: make(map[uint64]holderFile)}
	deadline := s.at.Add(budget)
	wanted := make(map[string]uint64)
	for _, proto := range []flow.Proto{flow.TCP, flow.UDP} {
		for _, family := range []string{"", "6"} {
			h.table(proto, family, deadline, func(r socketRow) {
				k := portKey{proto, r.local.Port()}
				s.rows[k] = append(s.rows[k], r)
				wanted[socketLink(r.inode)] = r.inode
			})
		}
	}
	for _, pid := range h.pids() {
		if len(wanted) == 0 || time.Now().After(deadline) {
			break
		}
		h.files(pid, deadline, wanted, s.files)
	}
	s.took = time.Since(s.at)
	return s
}

// table calls add for the sockets of one protocol and family that a process has.
func (h *holders) table(proto flow.Proto, family string, deadline time.Time, add func(socketRow)) {
	// The thread's own: /proc/net is the network namespace of the process' first thread.
	f, err := os.Open(h.path("thread-self", "net", proto.String()+family))
	if err != nil {
		return
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for n := 0; n < tableRows && lines.Scan(); n++ {
		if n%256 == 255 && time.Now().After(deadline) {
			return
		}
		if r, ok := parseSocketRow(lines.Text(), proto); ok && r.inode != 0 {
			add(r)
		}
	}
}

// The states in these tables, as the kernel's enum numbers them.
const (
	tcpListen = "0A"
	udpUnconn = "07" // TCP_CLOSE: a UDP socket without a peer
)

// parseSocketRow reads a line of /proc/net/tcp and its like:
//
//	0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000 0 31337 1 ...
func parseSocketRow(line string, proto flow.Proto) (r socketRow, ok bool) {
	f := strings.Fields(line)
	if len(f) < 10 {
		return r, false
	}
	if r.local, ok = parseHexAddr(f[1]); !ok {
		return r, false
	}
	uid, err1 := strconv.ParseUint(f[7], 10, 32)
	inode, err2 := strconv.ParseUint(f[9], 10, 64)
	r.uid, r.inode = uint32(uid), inode
	r.listen = f[3] == tcpListen
	if proto == flow.UDP {
		r.listen = f[3] == udpUnconn
	}
	return r, err1 == nil && err2 == nil
}

// parseHexAddr reads ADDRESS:PORT, where the address is in 32-bit words of the
// machine's byte order and the port is a number.
func parseHexAddr(s string) (netip.AddrPort, bool) {
	host, port, _ := strings.Cut(s, ":")
	b, err := hex.DecodeString(host)
	p, bad := strconv.ParseUint(port, 16, 16)
	if err != nil || bad != nil || len(b) != 4 && len(b) != 16 {
		return netip.AddrPort{}, false
	}
	for w := range slices.Chunk(b, 4) {
		binary.BigEndian.PutUint32(w, binary.NativeEndian.Uint32(w))
	}
	a, _ := netip.AddrFromSlice(b)
	return netip.AddrPortFrom(a.Unmap(), uint16(p)), true
}

// pids returns the processes, the oldest of a family first: of a server and its
// workers, which share their sockets, the server.
func (h *holders) pids() []int {
	d, err := os.Open(h.path())
	if err != nil {
		return nil
	}
	defer d.Close()
	entries, _ := d.Readdirnames(-1) // what could be read is good enough
	var pids []int
	for _, e := range entries {
		if pid, err := strconv.Atoi(e); err == nil {
			pids = append(pids, pid)
		}
	}
	slices.Sort(pids)
	return pids
}

// files moves what a process has of wanted, inodes by link text, to found. A process
// may have a million descriptors, so this, too, ends at the deadline.
func (h *holders) files(pid int, deadline time.Time, wanted map[string]uint64, found map[uint64]holderFile) {
	d, err := os.Open(h.path(strconv.Itoa(pid), "fd"))
	if err != nil {
		return // ended, or another user's
	}
	defer d.Close()
	for !time.Now().After(deadline) {
		fds, _ := d.Readdirnames(256) // what could be read is good enough
		if len(fds) == 0 {
			return
		}
		for _, fd := range fds {
			link, err := os.Readlink(h.path(strconv.Itoa(pid), "fd", fd))
			if err != nil {
				continue
			}
			if inode, ok := wanted[link]; ok {
				found[inode] = holderFile{pid, fd}
				delete(wanted, link)
			}
		}
	}
}
