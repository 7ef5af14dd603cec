package doctor

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

const (
	// The oldest kernel that slipway is made for: Debian 11's. The owner of nft
	// tables (5.12) and USO (6.2) are used where they are there.
	wantMajor, wantMinor = 5, 10

	// wantFiles is how many descriptors a busy daemon needs: two for each of
	// 10,000 TCP flows, one for each of 16,384 UDP mappings, and some.
	wantFiles = 40_000

	resolvConfPath = "/etc/resolv.conf"
	pingSysctl     = "net.ipv4.ping_group_range"
)

func (h *host) kernel() Finding {
	f := Finding{Name: "kernel", Status: OK}
	b, err := h.readFile("/proc/sys/kernel/osrelease")
	release := strings.TrimSpace(string(b))
	major, minor, ok := version(release)
	switch {
	case err != nil || !ok:
		f.Status, f.Detail = Warn, fmt.Sprintf("cannot tell the version from %q", release)
	case major < wantMajor || major == wantMajor && minor < wantMinor:
		f.Status, f.Detail = Fail, fmt.Sprintf("Linux %s is older than %d.%d", release, wantMajor, wantMinor)
	default:
		f.Detail = "Linux " + release
	}
	return f
}

// version reads "6.1.0-18-amd64".
func version(release string) (major, minor int, ok bool) {
	a, rest, _ := strings.Cut(release, ".")
	b, _, _ := strings.Cut(rest, ".")
	b = b[:len(b)-len(strings.TrimLeft(b, "0123456789"))]
	major, err1 := strconv.Atoi(a)
	minor, err2 := strconv.Atoi(b)
	return major, minor, err1 == nil && err2 == nil
}

func (h *host) tun(tried trialReport, trialErr error) Finding {
	const path = "/dev/net/tun"
	f := Finding{Name: "tun", Status: Fail}
	err := h.openTUN()
	switch {
	case errors.Is(err, fs.ErrNotExist):
		f.Detail = path + " does not exist (in a container: start it with --device " + path + ")"
		f.Fix = h.sudo("modprobe tun")
	case errors.Is(err, syscall.ENODEV), errors.Is(err, syscall.ENXIO):
		f.Detail = path + " has no driver"
		f.Fix = h.sudo("modprobe tun")
	case errors.Is(err, syscall.EACCES):
		f.Detail = path + " is not for this user"
		f.Fix = h.sudo("chmod 0666 " + path)
	case errors.Is(err, syscall.EPERM):
		f.Detail = path + " is forbidden here (in a container: start it with --device " + path + ")"
	case err != nil:
		f.Detail = fmt.Sprintf("%s: %v", path, err)
	case trialErr == nil && tried.TUN != "" && !tried.TUNDenied:
		f.Detail = "no device can be made: " + tried.TUN
	default: // what a denied trial means is the business of capabilities and userNamespaces
		f.Status, f.Detail = OK, path+" opens"
	}
	return f
}

// capabilities is asked of root.
func (h *host) capabilities(trialErr error) Finding {
	f := Finding{Name: "capabilities", Status: OK, Detail: "CAP_NET_ADMIN and CAP_SYS_ADMIN"}
	var lacking []string
	if !h.capable(capNetAdmin) {
		lacking = append(lacking, "CAP_NET_ADMIN")
	}
	if !h.capable(capSysAdmin) {
		lacking = append(lacking, "CAP_SYS_ADMIN")
	}
	switch {
	case len(lacking) > 0:
		f.Status, f.Detail = Fail, "root here lacks "+strings.Join(lacking, " and ")+" to make namespaces; --rootless may do"
	case trialErr != nil && !errors.Is(trialErr, errNoAnswer):
		f.Status, f.Detail = Fail, fmt.Sprintf("a network namespace cannot be made: %v", trialErr)
	}
	return f
}

func (h *host) offloads(tried trialReport, err error) Finding {
	f := Finding{Name: "tun offloads", Status: OK}
	accepted := strings.Join(tried.Accepted, " ")
	switch {
	case err != nil || tried.TUN != "":
		f.Status, f.Detail = Warn, "cannot tell: no device could be made"
	case slices.Contains(tried.Refused, "tso4") || slices.Contains(tried.Refused, "tso6"):
		f.Status, f.Detail = Warn, fmt.Sprintf("the kernel refuses %s: bulk TCP is slow", strings.Join(tried.Refused, " "))
	case slices.Contains(tried.Refused, "uso"):
		f.Detail = accepted + "; not uso, which Linux has since 6.2: bulk UDP takes more CPU"
	case len(tried.Refused) > 0:
		f.Detail = accepted + "; not " + strings.Join(tried.Refused, " ")
	default:
		f.Detail = accepted
	}
	return f
}

// netfilter is about the identity SNAT of the guest's containers.
func (h *host) netfilter(tried trialReport, err error) Finding {
	const effect = "all containers of an engine show as one address"
	f := Finding{Name: "nf_tables", Status: Warn}
	switch {
	case err != nil:
		f.Detail = "cannot tell: no namespace could be made"
	case tried.NFTMissing:
		f.Detail = fmt.Sprintf("the kernel has no nat chains (%s): %s", tried.NFT, effect)
		f.Fix = h.sudo("modprobe -a nf_tables nft_chain_nat nft_nat")
	case tried.NFT != "":
		f.Detail = fmt.Sprintf("a nat chain cannot be loaded (%s): %s", tried.NFT, effect)
	default:
		f.Status, f.Detail = OK, "nat chains load in a namespace of its own"
	}
	return f
}

func (h *host) ping() Finding {
	f := Finding{Name: "ping sockets", Status: OK}
	first, last, ok := groupRange(h.sysctl(pingSysctl))
	inRange := func(gid int) bool { return ok && first <= gid && gid <= last }
	switch {
	case inRange(h.egid) || slices.ContainsFunc(h.groups, inRange): // net/ipv4/ping.c, ping_init_sock
		f.Detail = fmt.Sprintf("%s is %d %d", pingSysctl, first, last)
	case h.rawPing() == nil:
		f.Detail = "raw sockets, by CAP_NET_RAW"
	default:
		f.Status = Warn
		f.Detail = fmt.Sprintf("%s does not include our group %d: ping and traceroute get no answer inside", pingSysctl, h.egid)
		f.Fix = h.setSysctl(pingSysctl, `"0 2147483647"`) // GID_T_MAX
	}
	return f
}

// groupRange reads "0 2147483647".
func groupRange(s string) (first, last int, ok bool) {
	words := strings.Fields(s)
	if len(words) != 2 {
		return 0, 0, false
	}
	first, err1 := strconv.Atoi(words[0])
	last, err2 := strconv.Atoi(words[1])
	return first, last, err1 == nil && err2 == nil
}

func (h *host) nsenter() Finding {
	path, err := h.lookPath("nsenter")
	if err != nil {
		return Finding{"nsenter", Warn, "not installed (util-linux): slipway attach does not work", h.install("nsenter")}
	}
	return Finding{Name: "nsenter", Status: OK, Detail: path}
}

// route is about a family's default route, which the guest has only while the host has.
func route(name, family string, there bool, err error) Finding {
	f := Finding{Name: name, Status: OK, Detail: "the host has one"}
	switch {
	case err != nil:
		f.Status, f.Detail = Warn, fmt.Sprintf("cannot tell: %v", err)
	case !there:
		f.Detail = "none: " + family + " is unreachable inside, as on the host"
		if family == "IPv4" {
			f.Status = Warn
		}
	}
	return f
}

func (h *host) stateDir() Finding {
	f := Finding{Name: "state directory", Status: OK}
	dir := h.env("XDG_RUNTIME_DIR")
	switch {
	case h.euid == 0:
		dir = "/run"
	case !strings.HasPrefix(dir, "/"):
		f.Status, f.Detail = Warn, "XDG_RUNTIME_DIR is not set: the temporary directory is used, which other programs clean up"
		f.Fix = h.sudo("loginctl enable-linger " + h.name())
		if run := fmt.Sprintf("/run/user/%d", h.euid); h.isDir(run) {
			f.Fix = "export XDG_RUNTIME_DIR=" + run
		}
		return f
	}
	if err := h.writable(dir); err != nil {
		f.Status, f.Detail = Fail, fmt.Sprintf("%s is not writable: %v", dir, err)
		if run := fmt.Sprintf("/run/user/%d", h.euid); h.euid != 0 && dir != run && h.isDir(run) {
			f.Fix = "export XDG_RUNTIME_DIR=" + run
		}
		return f
	}
	f.Detail = dir + " is writable"
	return f
}

func (h *host) files() Finding {
	f := Finding{Name: "open files", Status: OK}
	hard, err := h.openFiles()
	switch {
	case err != nil:
		f.Status, f.Detail = Warn, fmt.Sprintf("cannot tell the limit: %v", err)
	case hard < wantFiles:
		f.Status, f.Detail = Warn, fmt.Sprintf("at most %d: a busy engine needs %d", hard, wantFiles)
		f.Fix = h.sudo("prlimit --pid $$ --nofile=1048576:1048576")
	default:
		f.Detail = fmt.Sprintf("at most %d", hard)
	}
	return f
}

func (h *host) resolvConf() Finding {
	f := Finding{Name: "resolv.conf", Status: Warn}
	b, err := h.readFile(resolvConfPath)
	if err != nil {
		f.Detail = fmt.Sprintf("cannot be read (%v): 127.0.0.1 is asked for every name", bare(err))
		return f
	}
	var servers []string
	for line := range strings.Lines(string(b)) {
		words := strings.Fields(line)
		if len(words) < 2 || words[0] != "nameserver" {
			continue
		}
		if a, err := netip.ParseAddr(words[1]); err == nil {
			servers = append(servers, a.String())
		}
	}
	if len(servers) == 0 {
		f.Detail = resolvConfPath + " names no server: 127.0.0.1 is asked for every name"
		return f
	}
	f.Status, f.Detail = OK, strings.Join(servers, ", ")
	return f
}

// bare is the reason inside an error that names the file again.
func bare(err error) error {
	var path *fs.PathError
	if errors.As(err, &path) {
		return path.Err
	}
	return err
}
