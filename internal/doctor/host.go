package doctor

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// host is the machine and the user as the checks see them. What a check asks beyond
// files is a function, so that tests can be any machine.
type host struct {
	rootless   bool // the engine gets a user namespace
	euid, egid int
	groups     []int  // supplementary ones
	user       string // empty if it has no name

	env          func(string) string
	readFile     func(path string) ([]byte, error)
	lookPath     func(program string) (string, error)
	privileged   func(path string) bool // a program that runs with more rights than its caller's
	isDir        func(path string) bool
	writable     func(dir string) error // nil if we may make files in it
	openTUN      func() error
	rawPing      func() error                    // nil if we may open a raw ICMP socket
	bindLow      func() error                    // of taking a privileged port
	openFiles    func() (hard uint64, err error) // RLIMIT_NOFILE
	defaultRoute func(ctx context.Context) (v4, v6 bool, err error)
	trial        func(ctx context.Context) (trialReport, error)
}

// trialReport is what the child found in namespaces of its own. An empty text is
// success.
type trialReport struct {
	TUN       string // error of making a TUN device
	TUNDenied bool   // ... because it lacks CAP_NET_ADMIN in its own namespace
	Accepted  []string
	Refused   []string // offloads

	NFT        string // error of loading a nat chain
	NFTDenied  bool   // as TUNDenied
	NFTMissing bool   // ... because the kernel lacks a part

	KernelLacks []string // parts of the kernel path that the kernel does not have
	Kernel      string   // another error with one of them
}

// errNoAnswer says that the trial's child ran and did not report.
var errNoAnswer = errors.New("the trial gave no answer")

// check runs all checks.
func (h *host) check(ctx context.Context) []Finding {
	tried, err := h.trial(ctx)
	v4, v6, routeErr := h.defaultRoute(ctx)
	findings := []Finding{h.kernel(), h.tun(tried, err)}
	if h.rootless {
		findings = append(findings, h.userNamespaces(tried, err), h.subordinateIDs())
	} else {
		findings = append(findings, h.capabilities(err))
	}
	return append(findings,
		h.offloads(tried, err),
		h.netfilter(tried, err),
		h.kernelPath(tried, err),
		h.ping(),
		h.lowPorts(),
		h.refusals(),
		h.nsenter(),
		route("default route IPv4", "IPv4", v4, routeErr),
		route("default route IPv6", "IPv6", v6, routeErr),
		h.stateDir(),
		h.files(),
		h.resolvConf(),
	)
}

// sudo is the command for somebody who is not root.
func (h *host) sudo(command string) string {
	if h.euid == 0 {
		return command
	}
	return "sudo " + command
}

// sysctl returns a kernel setting, "" if there is none.
func (h *host) sysctl(name string) string {
	b, err := h.readFile("/proc/sys/" + strings.ReplaceAll(name, ".", "/"))
	if err != nil {
		return ""
	}
	return strings.Join(strings.Fields(string(b)), " ")
}

func (h *host) setSysctl(name, value string) string {
	return h.sudo(fmt.Sprintf("sysctl -w %s=%s", name, value))
}

// Bits of a capability set, from linux/capability.h.
const (
	capNetAdmin = 12
	capSysAdmin = 21
)

// capable tells whether we have a capability now.
func (h *host) capable(bit int) bool {
	b, err := h.readFile("/proc/self/status")
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(b)) {
		if value, ok := strings.CutPrefix(line, "CapEff:"); ok {
			set, err := strconv.ParseUint(strings.TrimSpace(value), 16, 64)
			return err == nil && set>>bit&1 == 1
		}
	}
	return false
}

// Packages by the family of distributions, with the command that installs them.
var installers = []struct {
	ids             []string // of os-release(5)
	command         string
	uidmap, nsenter string
}{
	{[]string{"debian", "ubuntu"}, "apt-get install -y", "uidmap", "util-linux"},
	{[]string{"fedora", "rhel", "centos"}, "dnf install -y", "shadow-utils", "util-linux"},
	{[]string{"suse", "opensuse"}, "zypper install -y", "shadow", "util-linux"},
	{[]string{"arch"}, "pacman -S --noconfirm", "shadow", "util-linux"},
	{[]string{"alpine"}, "apk add", "shadow-uidmap", "util-linux-misc"},
}

// install is the command that installs a program's package here, "" if we do not know.
func (h *host) install(program string) string {
	b, err := h.readFile("/etc/os-release")
	if err != nil {
		return ""
	}
	var ids []string
	for line := range strings.Lines(string(b)) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		if key == "ID" || key == "ID_LIKE" {
			ids = append(ids, strings.Fields(strings.Trim(value, `"'`))...)
		}
	}
	for _, i := range installers {
		if !slices.ContainsFunc(i.ids, func(id string) bool { return slices.Contains(ids, id) }) {
			continue
		}
		if program == "nsenter" {
			return h.sudo(i.command + " " + i.nsenter)
		}
		return h.sudo(i.command + " " + i.uidmap)
	}
	return ""
}
