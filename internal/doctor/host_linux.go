package doctor

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"strconv"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// trialLimit bounds the child, which needs some milliseconds unless the kernel loads
// modules for it.
const trialLimit = 5 * time.Second

func examine(ctx context.Context, opt Options) []Finding { return newHost(opt).check(ctx) }

// newHost is the machine we are on.
func newHost(opt Options) *host {
	h := &host{
		euid: os.Geteuid(), egid: os.Getegid(),
		env:          os.Getenv,
		readFile:     os.ReadFile,
		lookPath:     exec.LookPath,
		privileged:   privileged,
		isDir:        func(path string) bool { fi, err := os.Stat(path); return err == nil && fi.IsDir() },
		writable:     func(dir string) error { return unix.Access(dir, unix.W_OK|unix.X_OK) },
		openTUN:      func() error { return openAndClose("/dev/net/tun") },
		rawPing:      rawPing,
		bindLow:      bindLow,
		openFiles:    openFiles,
		defaultRoute: defaultRoute,
	}
	h.rootless = opt.Rootless || h.euid != 0
	h.groups, _ = os.Getgroups() // none is a fine answer
	if u, err := user.LookupId(strconv.Itoa(h.euid)); err == nil {
		h.user = u.Username
	}
	h.trial = func(ctx context.Context) (trialReport, error) { return runTrial(ctx, h.rootless) }
	return h
}

func openAndClose(path string) error {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

// rawPing opens a socket as forward does where ping sockets are closed. Having
// CAP_NET_RAW is not enough: it counts in the user namespace that owns our network.
func rawPing() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

// bindLow takes the lowest port of the loopback for a moment, and does not listen. Having
// CAP_NET_BIND_SERVICE is not enough either.
func bindLow() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Bind(fd, &unix.SockaddrInet4{Port: 1, Addr: [4]byte{127, 0, 0, 1}})
}

// privileged tells whether a program is set-uid or has file capabilities
// (capabilities(7)).
func privileged(path string) bool {
	fi, err := os.Stat(path)
	if err != nil {
		return false
	}
	n, err := unix.Getxattr(path, "security.capability", nil)
	return fi.Mode()&os.ModeSetuid != 0 || err == nil && n > 0
}

// openFiles is the hard limit; the Go runtime raises the soft one to it.
func openFiles() (uint64, error) {
	var l unix.Rlimit
	err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l)
	return l.Max, err
}

// widest4 and widest6 are the longest prefixes that still count as a default route:
// VPN clients install 0.0.0.0/1 and 128.0.0.0/1, or 2000::/3. The daemon counts alike.
const widest4, widest6 = 7, 6

// defaultRoute looks at every table, since VPN clients have tables of their own.
func defaultRoute(context.Context) (v4, v6 bool, err error) {
	for _, f := range []struct {
		family, widest int
		found          *bool
	}{{unix.AF_INET, widest4, &v4}, {unix.AF_INET6, widest6, &v6}} {
		routes, err := netlink.RouteListFiltered(f.family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) {
			continue // a kernel without IPv6
		}
		if err != nil {
			return v4, v6, fmt.Errorf("read routes: %w", err)
		}
		for _, r := range routes {
			bits := 0
			if r.Dst != nil {
				bits, _ = r.Dst.Mask.Size()
			}
			*f.found = *f.found || r.Type == unix.RTN_UNICAST && r.Table != unix.RT_TABLE_LOCAL && bits <= f.widest
		}
	}
	return v4, v6, nil
}

// runTrial runs the child and returns its report. The namespaces end with the child.
func runTrial(ctx context.Context, rootless bool) (trialReport, error) {
	ctx, cancel := context.WithTimeout(ctx, trialLimit)
	defer cancel()
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Args = []string{trialName}
	cmd.Stdout = &out
	cmd.WaitDelay = time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	if rootless {
		cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Geteuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getegid(), Size: 1}}
	}
	if err := cmd.Start(); err != nil {
		return trialReport{}, bare(err)
	}
	waitErr := cmd.Wait()
	var r trialReport
	if err := json.Unmarshal(out.Bytes(), &r); err != nil {
		return trialReport{}, fmt.Errorf("%w (%v)", errNoAnswer, errors.Join(context.Cause(ctx), waitErr))
	}
	return r, nil
}
