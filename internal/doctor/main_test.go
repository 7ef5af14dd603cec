package doctor

import (
	"context"
	"io/fs"
	"os"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if IsTrial() {
		Trial()
	}
	goleak.VerifyTestMain(m)
}

// files are the contents of a machine's files by path.
type files map[string]string

func (f files) read(path string) ([]byte, error) {
	text, ok := f[path]
	if !ok {
		return nil, &fs.PathError{Op: "open", Path: path, Err: fs.ErrNotExist}
	}
	return []byte(text), nil
}

// goodMachine is one on which user alice lacks nothing. Tests break one thing.
func goodMachine() (*host, files) {
	f := files{
		"/proc/sys/kernel/osrelease":          "6.8.0-45-generic\n",
		"/proc/sys/user/max_user_namespaces":  "127000\n",
		"/proc/sys/net/ipv4/ping_group_range": "0\t2147483647\n",
		"/proc/self/status":                   "Name:\tslipway\nCapEff:\t0000000000000000\n",
		"/etc/os-release":                     "NAME=\"Ubuntu\"\nID=ubuntu\nID_LIKE=debian\n",
		"/etc/subuid":                         "alice:100000:65536\n",
		"/etc/subgid":                         "alice:100000:65536\n",
		"/etc/resolv.conf":                    "# by hand\nsearch example.org\nnameserver 192.0.2.53\nnameserver 2001:db8::53\n",
	}
	h := &host{
		rootless: true, euid: 1000, egid: 1000, groups: []int{27}, user: "alice",
		env: func(name string) string {
			return map[string]string{"XDG_RUNTIME_DIR": "/run/user/1000"}[name]
		},
		readFile:     f.read,
		lookPath:     func(program string) (string, error) { return "/usr/bin/" + program, nil },
		privileged:   func(string) bool { return true },
		isDir:        func(string) bool { return true },
		writable:     func(string) error { return nil },
		openTUN:      func() error { return nil },
		rawPing:      func() error { return os.ErrPermission },
		bindLow:      func() error { return nil },
		openFiles:    func() (uint64, error) { return 524288, nil },
		defaultRoute: func(context.Context) (bool, bool, error) { return true, true, nil },
		trial: func(context.Context) (trialReport, error) {
			return trialReport{Accepted: []string{"csum", "tso4", "tso6", "ecn", "uso"}}, nil
		},
	}
	return h, f
}

// asRoot makes h root's, with all capabilities.
func asRoot(h *host, f files) {
	h.rootless, h.euid, h.egid, h.groups, h.user = false, 0, 0, []int{0}, "root"
	f["/proc/self/status"] = "CapEff:\t000001ffffffffff\n"
}

// notFound is the answer of lookPath on a machine without the program.
func notFound(missing string) func(string) (string, error) {
	return func(program string) (string, error) {
		if program == missing {
			return "", os.ErrNotExist
		}
		return "/usr/bin/" + program, nil
	}
}
