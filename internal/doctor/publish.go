package doctor

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// What published ports and the kernel path ask of a host.

const (
	lowPortsSysctl = "net.ipv4.ip_unprivileged_port_start"
	// firstUnprivileged is where it begins on a kernel as it comes, PROT_SOCK.
	firstUnprivileged = 1024
)

// kernelParts are what the rules of the kernel path are made of, with the modules in
// which a kernel may have them.
var kernelParts = []struct{ name, modules string }{
	{"tproxy", "nft_tproxy"},
	{"socket", "nft_socket"},
	{"fib", "nft_fib_ipv4 nft_fib_ipv6"},
	{"conntrack", "nft_ct"},
	{"ip rule", ""},
	{"transparent sockets", ""},
}

// kernelPath is about the faster of the two ways of TCP.
func (h *host) kernelPath(tried trialReport, err error) Finding {
	const effect = "TCP takes netstack, which is slower"
	f := Finding{Name: "kernel path", Status: Warn}
	switch {
	case err != nil:
		f.Detail = "cannot tell: no namespace could be made"
	case tried.Kernel != "":
		f.Detail = fmt.Sprintf("%s: %s", tried.Kernel, effect)
	case len(tried.KernelLacks) > 0:
		f.Detail = fmt.Sprintf("the kernel lacks %s: %s", strings.Join(tried.KernelLacks, ", "), effect)
		if m := modules(tried.KernelLacks); m != "" {
			f.Fix = h.sudo("modprobe -a " + m)
		}
	default:
		f.Status, f.Detail = OK, "its rules load: tproxy, socket, fib, conntrack"
	}
	return f
}

// modules are those of some parts.
func modules(lacking []string) string {
	var m []string
	for _, p := range kernelParts {
		if p.modules != "" && slices.Contains(lacking, p.name) {
			m = append(m, p.modules)
		}
	}
	return strings.Join(m, " ")
}

// lowPorts is about publishing ports like 80.
func (h *host) lowPorts() Finding {
	f := Finding{Name: "privileged ports", Status: OK}
	first, err := strconv.Atoi(h.sysctl(lowPortsSysctl))
	if err != nil {
		first = firstUnprivileged
	}
	switch err := h.bindLow(); {
	case err == nil, errors.Is(err, syscall.EADDRINUSE):
		f.Detail = "every port can be published"
	case errors.Is(err, syscall.EACCES):
		f.Status, f.Detail = Warn, fmt.Sprintf("%s is %d: lower ports cannot be published", lowPortsSysctl, first)
		f.Fix = h.setSysctl(lowPortsSysctl, "0")
	default:
		f.Status, f.Detail = Warn, fmt.Sprintf("cannot tell: %v", err)
	}
	return f
}

// refusals is about clients of a published UDP port that nobody in the guest has.
func (h *host) refusals() Finding {
	f := Finding{Name: "icmp errors", Status: OK, Detail: "clients of a closed UDP port are refused, by raw sockets"}
	if err := h.rawPing(); err != nil {
		f.Detail = "none without CAP_NET_RAW: clients of a closed UDP port get no answer"
	}
	return f
}
