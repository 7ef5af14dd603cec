package doctor

import (
	"context"
	"errors"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestGoodMachine(t *testing.T) {
	for _, root := range []bool{false, true} {
		h, f := goodMachine()
		if root {
			asRoot(h, f)
		}
		findings := h.check(t.Context())
		if Failed(findings) {
			t.Error("Failed is true")
		}
		for _, f := range findings {
			if f.Status != OK || f.Fix != "" || f.Detail == "" || f.Name == "" {
				t.Errorf("root %v: %+v", root, f)
			}
		}
	}
}

// trial makes the child's report a fixed one.
func trial(r trialReport, err error) func(context.Context) (trialReport, error) {
	return func(context.Context) (trialReport, error) { return r, err }
}

// Each case breaks one thing on a good machine, and only that is found.
func TestFindings(t *testing.T) {
	const noIDs = "there is only one user inside, which most images do not take"
	for _, c := range []struct {
		name    string
		breakIt func(*host, files)
		want    []Finding // those that are not OK, and those named in ok
		ok      string    // also compare this one
	}{
		{name: "old_kernel", breakIt: func(_ *host, f files) { f["/proc/sys/kernel/osrelease"] = "5.9.16\n" },
			want: []Finding{{"kernel", Fail, "Linux 5.9.16 is older than 5.10", ""}}},
		{name: "oldest_kernel", breakIt: func(_ *host, f files) { f["/proc/sys/kernel/osrelease"] = "5.10-rc1\n" }, ok: "kernel",
			want: []Finding{{"kernel", OK, "Linux 5.10-rc1", ""}}},
		{name: "strange_kernel", breakIt: func(_ *host, f files) { f["/proc/sys/kernel/osrelease"] = "six\n" },
			want: []Finding{{"kernel", Warn, `cannot tell the version from "six"`, ""}}},

		{name: "no_tun", breakIt: func(h *host, _ files) { h.openTUN = func() error { return syscall.ENOENT } },
			want: []Finding{{"tun", Fail, "/dev/net/tun does not exist (in a container: start it with --device /dev/net/tun)", "sudo modprobe tun"}}},
		{name: "no_tun_driver", breakIt: func(h *host, _ files) { h.openTUN = func() error { return syscall.ENODEV } },
			want: []Finding{{"tun", Fail, "/dev/net/tun has no driver", "sudo modprobe tun"}}},
		{name: "tun_mode", breakIt: func(h *host, _ files) { h.openTUN = func() error { return syscall.EACCES } },
			want: []Finding{{"tun", Fail, "/dev/net/tun is not for this user", "sudo chmod 0666 /dev/net/tun"}}},
		{name: "tun_forbidden", breakIt: func(h *host, _ files) { h.openTUN = func() error { return syscall.EPERM } },
			want: []Finding{{"tun", Fail, "/dev/net/tun is forbidden here (in a container: start it with --device /dev/net/tun)", ""}}},
		{name: "no_device", breakIt: func(h *host, _ files) { h.trial = trial(trialReport{TUN: "TUNSETIFF: no such device"}, nil) },
			want: []Finding{
				{"tun", Fail, "no device can be made: TUNSETIFF: no such device", ""},
				{"tun offloads", Warn, "cannot tell: no device could be made", ""},
			}},

		{name: "no_uso", breakIt: func(h *host, _ files) {
			h.trial = trial(trialReport{Accepted: []string{"csum", "tso4", "tso6", "ecn"}, Refused: []string{"uso"}}, nil)
		}, ok: "tun offloads",
			want: []Finding{{"tun offloads", OK, "csum tso4 tso6 ecn; not uso, which Linux has since 6.2: bulk UDP takes more CPU", ""}}},
		{name: "no_tso", breakIt: func(h *host, _ files) {
			h.trial = trial(trialReport{Accepted: []string{"csum"}, Refused: []string{"tso4", "tso6", "ecn", "uso"}}, nil)
		}, want: []Finding{{"tun offloads", Warn, "the kernel refuses tso4 tso6 ecn uso: bulk TCP is slow", ""}}},

		{name: "no_user_namespaces", breakIt: func(h *host, f files) {
			f["/proc/sys/user/max_user_namespaces"] = "0\n"
			h.trial = trial(trialReport{}, syscall.ENOSPC)
		}, want: []Finding{
			{"user namespaces", Fail, "user.max_user_namespaces is 0", "sudo sysctl -w user.max_user_namespaces=15000"},
			{"tun offloads", Warn, "cannot tell: no device could be made", ""},
			{"nf_tables", Warn, "cannot tell: no namespace could be made", ""},
			{"kernel path", Warn, "cannot tell: no namespace could be made", ""},
		}},
		{name: "user_namespaces_used_up", breakIt: func(h *host, _ files) { h.trial = trial(trialReport{}, syscall.ENOSPC) },
			want: []Finding{
				{"user namespaces", Fail, "user.max_user_namespaces, 127000, is used up", "sudo sysctl -w user.max_user_namespaces=254000"},
				{"tun offloads", Warn, "cannot tell: no device could be made", ""},
				{"nf_tables", Warn, "cannot tell: no namespace could be made", ""},
				{"kernel path", Warn, "cannot tell: no namespace could be made", ""},
			}},
		{name: "no_net_namespaces", breakIt: func(h *host, f files) {
			f["/proc/sys/user/max_net_namespaces"] = "0\n"
			h.trial = trial(trialReport{}, syscall.ENOSPC)
		}, want: []Finding{
			{"user namespaces", Fail, "user.max_net_namespaces is 0", "sudo sysctl -w user.max_net_namespaces=15000"},
			{"tun offloads", Warn, "cannot tell: no device could be made", ""},
			{"nf_tables", Warn, "cannot tell: no namespace could be made", ""},
			{"kernel path", Warn, "cannot tell: no namespace could be made", ""},
		}},
		{name: "debian_sysctl", breakIt: func(h *host, f files) {
			f["/proc/sys/kernel/unprivileged_userns_clone"] = "0\n"
			h.trial = trial(trialReport{}, syscall.EPERM)
		}, want: []Finding{
			{"user namespaces", Fail, "kernel.unprivileged_userns_clone is 0", "sudo sysctl -w kernel.unprivileged_userns_clone=1"},
			{"tun offloads", Warn, "cannot tell: no device could be made", ""},
			{"nf_tables", Warn, "cannot tell: no namespace could be made", ""},
			{"kernel path", Warn, "cannot tell: no namespace could be made", ""},
		}},
		{name: "apparmor", breakIt: func(h *host, f files) {
			f["/proc/sys/kernel/apparmor_restrict_unprivileged_userns"] = "1\n"
			h.trial = trial(trialReport{TUN: errDeniedText, TUNDenied: true, NFT: "operation not permitted", NFTDenied: true}, nil)
		}, want: []Finding{
			{"user namespaces", Fail, "AppArmor takes their capabilities away (kernel.apparmor_restrict_unprivileged_userns)",
				"sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"},
			{"tun offloads", Warn, "cannot tell: no device could be made", ""},
			{"nf_tables", Warn, "a nat chain cannot be loaded (operation not permitted): all containers of an engine show as one address", ""},
		}},
		{name: "apparmor_with_profile", breakIt: func(_ *host, f files) {
			f["/proc/sys/kernel/apparmor_restrict_unprivileged_userns"] = "1\n"
		}, ok: "user namespaces", want: []Finding{{"user namespaces", OK, "one could be made", ""}}},
		{name: "seccomp", breakIt: func(h *host, _ files) { h.trial = trial(trialReport{}, syscall.EPERM) },
			want: []Finding{
				{"user namespaces", Fail, "not permitted here (a container's seccomp profile, or a chroot)", ""},
				{"tun offloads", Warn, "cannot tell: no device could be made", ""},
				{"nf_tables", Warn, "cannot tell: no namespace could be made", ""},
				{"kernel path", Warn, "cannot tell: no namespace could be made", ""},
			}},
		{name: "no_answer", breakIt: func(h *host, _ files) { h.trial = trial(trialReport{}, errNoAnswer) },
			want: []Finding{
				{"user namespaces", Warn, "cannot tell: the trial gave no answer", ""},
				{"tun offloads", Warn, "cannot tell: no device could be made", ""},
				{"nf_tables", Warn, "cannot tell: no namespace could be made", ""},
				{"kernel path", Warn, "cannot tell: no namespace could be made", ""},
			}},

		{name: "no_newuidmap", breakIt: func(h *host, _ files) { h.lookPath = notFound("newuidmap") },
			want: []Finding{{"subordinate ids", Warn, "newuidmap is not installed: " + noIDs, "sudo apt-get install -y uidmap"}}},
		{name: "no_newgidmap_on_alpine", breakIt: func(h *host, f files) {
			h.lookPath = notFound("newgidmap")
			f["/etc/os-release"] = "ID=alpine\n"
		}, want: []Finding{{"subordinate ids", Warn, "newgidmap is not installed: " + noIDs, "sudo apk add shadow-uidmap"}}},
		{name: "no_newuidmap_somewhere", breakIt: func(h *host, f files) {
			h.lookPath = notFound("newuidmap")
			delete(f, "/etc/os-release")
		}, want: []Finding{{"subordinate ids", Warn, "newuidmap is not installed: " + noIDs, ""}}},
		{name: "newuidmap_without_setuid", breakIt: func(h *host, _ files) { h.privileged = func(p string) bool { return p != "/usr/bin/newgidmap" } },
			want: []Finding{{"subordinate ids", Warn, "/usr/bin/newgidmap is neither set-uid nor has file capabilities: " + noIDs, "sudo chmod u+s /usr/bin/newgidmap"}}},
		{name: "no_ranges", breakIt: func(_ *host, f files) {
			f["/etc/subuid"] = "bob:100000:65536\ncarol:165536:65536\n"
			delete(f, "/etc/subgid")
		}, want: []Finding{{"subordinate ids", Warn, "0 users in /etc/subuid and 0 groups in /etc/subgid for alice, 65535 are needed: " + noIDs,
			"sudo usermod --add-subuids 231072-296607 --add-subgids 100000-165535 alice"}}},
		{name: "small_range", breakIt: func(_ *host, f files) { f["/etc/subuid"] = "alice:500000:1000\ngarbage\nalice:x:9\n" },
			want: []Finding{{"subordinate ids", Warn, "1000 users in /etc/subuid and 65536 groups in /etc/subgid for alice, 65535 are needed: images with higher ids do not unpack",
				"sudo usermod --add-subuids 501000-566535 alice"}}},
		{name: "ranges_by_number", breakIt: func(_ *host, f files) {
			f["/etc/subuid"], f["/etc/subgid"] = "1000:1:40000\n1000:50000:30000", "1000:1:65535\n"
		},
			ok: "subordinate ids", want: []Finding{{"subordinate ids", OK, "70000 users and 65535 groups for alice", ""}}},

		{name: "no_nat", breakIt: func(h *host, _ files) {
			h.trial = trial(trialReport{Accepted: []string{"csum"}, NFT: "no such file or directory", NFTMissing: true}, nil)
		}, want: []Finding{{"nf_tables", Warn, "the kernel has no nat chains (no such file or directory): all containers of an engine show as one address",
			"sudo modprobe -a nf_tables nft_chain_nat nft_nat"}}},

		{name: "no_tproxy", breakIt: func(h *host, _ files) {
			h.trial = trial(trialReport{Accepted: []string{"csum"}, KernelLacks: []string{"tproxy", "fib"}}, nil)
		}, want: []Finding{{"kernel path", Warn, "the kernel lacks tproxy, fib: TCP takes netstack, which is slower",
			"sudo modprobe -a nft_tproxy nft_fib_ipv4 nft_fib_ipv6"}}},
		{name: "no_ip_rule", breakIt: func(h *host, _ files) {
			h.trial = trial(trialReport{Accepted: []string{"csum"}, KernelLacks: []string{"ip rule"}}, nil)
		}, want: []Finding{{"kernel path", Warn, "the kernel lacks ip rule: TCP takes netstack, which is slower", ""}}},
		{name: "kernel_path_denied", breakIt: func(h *host, _ files) {
			h.trial = trial(trialReport{Accepted: []string{"csum"}, Kernel: "socket: operation not permitted", KernelLacks: []string{"fib"}}, nil)
		}, want: []Finding{{"kernel path", Warn, "socket: operation not permitted: TCP takes netstack, which is slower", ""}}},

		{name: "low_ports", breakIt: func(h *host, f files) {
			h.bindLow = func() error { return syscall.EACCES }
			f["/proc/sys/net/ipv4/ip_unprivileged_port_start"] = "80\n"
		}, want: []Finding{{"privileged ports", Warn, "net.ipv4.ip_unprivileged_port_start is 80: lower ports cannot be published",
			"sudo sysctl -w net.ipv4.ip_unprivileged_port_start=0"}}},
		{name: "low_ports_without_the_file", breakIt: func(h *host, f files) { h.bindLow = func() error { return syscall.EACCES } },
			want: []Finding{{"privileged ports", Warn, "net.ipv4.ip_unprivileged_port_start is 1024: lower ports cannot be published",
				"sudo sysctl -w net.ipv4.ip_unprivileged_port_start=0"}}},
		{name: "low_port_in_use", breakIt: func(h *host, _ files) { h.bindLow = func() error { return syscall.EADDRINUSE } },
			ok: "privileged ports", want: []Finding{{"privileged ports", OK, "every port can be published", ""}}},
		{name: "no_loopback", breakIt: func(h *host, _ files) { h.bindLow = func() error { return syscall.EADDRNOTAVAIL } },
			want: []Finding{{"privileged ports", Warn, "cannot tell: cannot assign requested address", ""}}},
		{name: "no_raw_sockets", breakIt: func(*host, files) {}, ok: "icmp errors",
			want: []Finding{{"icmp errors", OK, "none without CAP_NET_RAW: clients of a closed UDP port get no answer", ""}}},
		{name: "raw_sockets", breakIt: func(h *host, _ files) { h.rawPing = func() error { return nil } }, ok: "icmp errors",
			want: []Finding{{"icmp errors", OK, "clients of a closed UDP port are refused, by raw sockets", ""}}},

		{name: "no_ping", breakIt: func(_ *host, f files) { f["/proc/sys/net/ipv4/ping_group_range"] = "1\t0\n" },
			want: []Finding{{"ping sockets", Warn, "net.ipv4.ping_group_range does not include our group 1000: ping and traceroute get no answer inside",
				`sudo sysctl -w net.ipv4.ping_group_range="0 2147483647"`}}},
		{name: "no_ping_file", breakIt: func(_ *host, f files) { delete(f, "/proc/sys/net/ipv4/ping_group_range") },
			want: []Finding{{"ping sockets", Warn, "net.ipv4.ping_group_range does not include our group 1000: ping and traceroute get no answer inside",
				`sudo sysctl -w net.ipv4.ping_group_range="0 2147483647"`}}},
		{name: "ping_by_second_group", breakIt: func(_ *host, f files) { f["/proc/sys/net/ipv4/ping_group_range"] = "27 27\n" },
			ok: "ping sockets", want: []Finding{{"ping sockets", OK, "net.ipv4.ping_group_range is 27 27", ""}}},
		{name: "ping_by_capability", breakIt: func(h *host, f files) {
			f["/proc/sys/net/ipv4/ping_group_range"] = "1 0\n"
			h.rawPing = func() error { return nil }
		}, ok: "ping sockets", want: []Finding{{"ping sockets", OK, "raw sockets, by CAP_NET_RAW", ""}}},

		{name: "no_nsenter", breakIt: func(h *host, f files) {
			h.lookPath = notFound("nsenter")
			f["/etc/os-release"] = "ID=\"rocky\"\nID_LIKE=\"rhel centos fedora\"\n"
		}, want: []Finding{{"nsenter", Warn, "not installed (util-linux): slipway attach does not work", "sudo dnf install -y util-linux"}}},

		{name: "no_routes", breakIt: func(h *host, _ files) {
			h.defaultRoute = func(context.Context) (bool, bool, error) { return false, false, nil }
		}, want: []Finding{{"default route IPv4", Warn, "none: IPv4 is unreachable inside, as on the host", ""}}},
		{name: "no_ipv6", breakIt: func(h *host, _ files) {
			h.defaultRoute = func(context.Context) (bool, bool, error) { return true, false, nil }
		}, ok: "default route IPv6", want: []Finding{{"default route IPv6", OK, "none: IPv6 is unreachable inside, as on the host", ""}}},
		{name: "routes_unreadable", breakIt: func(h *host, _ files) {
			h.defaultRoute = func(context.Context) (bool, bool, error) { return false, false, errors.New("read routes: denied") }
		}, want: []Finding{
			{"default route IPv4", Warn, "cannot tell: read routes: denied", ""},
			{"default route IPv6", Warn, "cannot tell: read routes: denied", ""},
		}},

		{name: "no_runtime_dir", breakIt: func(h *host, _ files) { h.env = func(string) string { return "" } },
			want: []Finding{{"state directory", Warn, "XDG_RUNTIME_DIR is not set: the temporary directory is used, which other programs clean up",
				"export XDG_RUNTIME_DIR=/run/user/1000"}}},
		{name: "no_session", breakIt: func(h *host, _ files) {
			h.env = func(string) string { return "" }
			h.isDir = func(string) bool { return false }
		}, want: []Finding{{"state directory", Warn, "XDG_RUNTIME_DIR is not set: the temporary directory is used, which other programs clean up",
			"sudo loginctl enable-linger alice"}}},
		{name: "somebody_elses_runtime_dir", breakIt: func(h *host, _ files) {
			h.env = func(string) string { return "/run/user/0" }
			h.writable = func(string) error { return syscall.EACCES }
		}, want: []Finding{{"state directory", Fail, "/run/user/0 is not writable: permission denied", "export XDG_RUNTIME_DIR=/run/user/1000"}}},

		{name: "few_files", breakIt: func(h *host, _ files) { h.openFiles = func() (uint64, error) { return 4096, nil } },
			want: []Finding{{"open files", Warn, "at most 4096: a busy engine needs 40000", "sudo prlimit --pid $$ --nofile=1048576:1048576"}}},

		{name: "no_resolv_conf", breakIt: func(_ *host, f files) { delete(f, "/etc/resolv.conf") },
			want: []Finding{{"resolv.conf", Warn, "cannot be read (file does not exist): 127.0.0.1 is asked for every name", ""}}},
		{name: "no_servers", breakIt: func(_ *host, f files) { f["/etc/resolv.conf"] = "#nameserver 192.0.2.1\nnameserver\nnameserver here\n" },
			want: []Finding{{"resolv.conf", Warn, "/etc/resolv.conf names no server: 127.0.0.1 is asked for every name", ""}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h, f := goodMachine()
			c.breakIt(h, f)
			var got []Finding
			for _, f := range h.check(t.Context()) {
				if f.Status != OK || f.Name == c.ok {
					got = append(got, f)
				}
			}
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// errDeniedText is what the child of a confined program reports.
const errDeniedText = "not permitted in a namespace of its own"

func TestRoot(t *testing.T) {
	for _, c := range []struct {
		name    string
		breakIt func(*host, files)
		want    Finding
	}{
		{"in_a_container", func(_ *host, f files) { f["/proc/self/status"] = "CapEff:\t00000000a80425fb\n" },
			Finding{"capabilities", Fail, "root here lacks CAP_NET_ADMIN and CAP_SYS_ADMIN to make namespaces; --rootless may do", ""}},
		{"no_namespace", func(h *host, _ files) { h.trial = trial(trialReport{}, syscall.ENOSPC) },
			Finding{"capabilities", Fail, "a network namespace cannot be made: no space left on device", ""}},
		{"no_tun_needs_no_sudo", func(h *host, _ files) { h.openTUN = func() error { return syscall.ENODEV } },
			Finding{"tun", Fail, "/dev/net/tun has no driver", "modprobe tun"}},
		{"run_read_only", func(h *host, _ files) { h.writable = func(string) error { return syscall.EROFS } },
			Finding{"state directory", Fail, "/run is not writable: read-only file system", ""}},
		// Settings for ordinary users do not hold for root, who maps its own ids.
		{"rootless", func(h *host, f files) {
			h.rootless = true
			f["/proc/sys/kernel/unprivileged_userns_clone"] = "0\n"
			h.trial = trial(trialReport{}, syscall.EINVAL)
		}, Finding{"user namespaces", Fail, "none can be made: invalid argument", ""}},
		{"rootless_ids", func(h *host, f files) { h.rootless = true }, Finding{"subordinate ids", OK, "none for root, who maps its own", ""}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h, f := goodMachine()
			asRoot(h, f)
			c.breakIt(h, f)
			for _, got := range h.check(t.Context()) {
				if got.Name == c.want.Name {
					if diff := cmp.Diff(c.want, got); diff != "" {
						t.Errorf("(-want +got):\n%s", diff)
					}
					return
				}
			}
			t.Errorf("no finding %q", c.want.Name)
		})
	}
}

func TestFormat(t *testing.T) {
	for _, c := range []struct {
		f    Finding
		want string
	}{
		{Finding{"kernel", OK, "Linux 6.8.0", ""}, "ok    kernel               Linux 6.8.0"},
		{Finding{"tun", Fail, "gone", "sudo modprobe tun"},
			"fail  tun                  gone\n" + strings.Repeat(" ", 26) + " fix: sudo modprobe tun"},
	} {
		if diff := cmp.Diff(c.want, Format(c.f)); diff != "" {
			t.Errorf("Format (-want +got):\n%s", diff)
		}
	}
}
