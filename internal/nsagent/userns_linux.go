package nsagent

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"

	"github.com/moby/sys/user"
	"golang.org/x/sys/unix"
)

// A user namespace starts without any mapping. The agent nevertheless has
// capabilities in it from the start, as ambient ones survive its exec, so it sets up
// the network while the daemon writes the mapping. When that is there, the agent is
// root, without another exec, and so is what it starts.

// agentCaps are the capabilities the agent keeps over its exec in a new user namespace.
var agentCaps = []uintptr{
	unix.CAP_DAC_OVERRIDE, unix.CAP_KILL, unix.CAP_NET_ADMIN, unix.CAP_NET_RAW,
	unix.CAP_SYS_PTRACE, unix.CAP_SYS_ADMIN,
}

// maxExtents is the most lines of a mapping (user_namespaces(7), since Linux 4.15).
const maxExtents = 340

// idRange maps count IDs: inside, inside+1, ... to outside, outside+1, ...
type idRange struct{ inside, outside, count int64 }

// idMaps are the mappings of a user namespace.
type idMaps struct {
	kind     Mapping
	note     string // why only a single ID
	uid, gid []idRange
}

// mapIDs gives the user namespace of pid, which we have just made, the best mapping
// that this host grants us.
func mapIDs(pid int) (idMaps, error) {
	m, tools, err := planMaps()
	if err != nil {
		return m, err
	}
	if m.kind == MappingRanges && tools {
		return m, runMapTools(pid, m)
	}
	if err := writeMaps(pid, m); err == nil {
		return m, nil
	} else if m.kind != MappingIdentity {
		return m, &Error{Op: "map users", On: fmt.Sprintf("process %d", pid), Err: err, Hint: userNamespaceHint(err)}
	}
	// Root without CAP_SETUID, CAP_SETGID or CAP_SETFCAP, as some containers have it.
	m = singleMap("root here may not map other users")
	if err := writeMaps(pid, m); err != nil {
		return m, &Error{Op: "map users", On: fmt.Sprintf("process %d", pid), Err: err, Hint: userNamespaceHint(err)}
	}
	return m, nil
}

// planMaps decides which mapping we try. tools says that newuidmap and newgidmap are
// to write it; root can do that alone.
func planMaps() (m idMaps, tools bool, err error) {
	root := os.Geteuid() == 0
	uids, gids, note := subordinateIDs()
	switch {
	case note != "" && root:
		m, err = identityMap()
		return m, false, err
	case note != "":
		return singleMap(note), false, nil
	}
	if !root {
		for _, tool := range []string{"newuidmap", "newgidmap"} {
			if _, err := exec.LookPath(tool); err != nil {
				return singleMap(tool + " is not installed (Debian, Ubuntu: apt-get install uidmap)"), false, nil
			}
		}
	}
	return idMaps{
		kind: MappingRanges,
		uid:  rangeMap(os.Geteuid(), uids),
		gid:  rangeMap(os.Getegid(), gids),
	}, !root, nil
}

// subordinateIDs reads the ranges of the current user; note tells why there are none.
func subordinateIDs() (uids, gids []user.SubID, note string) {
	id := strconv.Itoa(os.Geteuid())
	name := id
	if u, err := user.CurrentUser(); err == nil { // fails for a user that /etc/passwd does not list
		name = u.Name
	}
	mine := func(s user.SubID) bool { return (s.Name == name || s.Name == id) && s.Count > 0 }
	for _, f := range []struct {
		path string
		ids  *[]user.SubID
	}{{"/etc/subuid", &uids}, {"/etc/subgid", &gids}} {
		list, err := user.ParseSubIDFileFilter(f.path, mine)
		switch {
		case err != nil && !errors.Is(err, os.ErrNotExist):
			return nil, nil, err.Error()
		case len(list) == 0:
			return nil, nil, fmt.Sprintf("%s has no range for user %s", f.path, name)
		}
		*f.ids = list
	}
	return uids, gids, ""
}

// rangeMap maps 0 to self and 1, 2, ... to the ranges.
func rangeMap(self int, ranges []user.SubID) []idRange {
	m := []idRange{{0, int64(self), 1}}
	next := int64(1)
	for _, r := range ranges[:min(len(ranges), maxExtents-1)] {
		m = append(m, idRange{next, r.SubID, r.Count})
		next += r.Count
	}
	return m
}

// singleMap maps 0 to ourselves and nothing else.
func singleMap(note string) idMaps {
	return idMaps{
		kind: MappingSingle,
		note: note,
		uid:  []idRange{{0, int64(os.Geteuid()), 1}},
		gid:  []idRange{{0, int64(os.Getegid()), 1}},
	}
}

// identityMap maps every ID that we have ourselves to itself.
func identityMap() (idMaps, error) {
	m := idMaps{kind: MappingIdentity}
	for _, f := range []struct {
		path string
		ids  *[]idRange
	}{{"/proc/self/uid_map", &m.uid}, {"/proc/self/gid_map", &m.gid}} {
		ours, err := user.ParseIDMapFile(f.path)
		if err != nil {
			return m, &Error{Op: "read", On: f.path, Err: err}
		}
		for _, e := range ours {
			*f.ids = append(*f.ids, idRange{e.ID, e.ID, e.Count})
		}
	}
	return m, nil
}

// writeMaps writes the mapping ourselves.
func writeMaps(pid int, m idMaps) error {
	if m.kind == MappingSingle {
		// Without it an ordinary user may not write gid_map (user_namespaces(7)).
		err := writeProc(pid, "setgroups", "deny")
		if err != nil && !errors.Is(err, os.ErrNotExist) { // before Linux 3.19
			return err
		}
	}
	if err := writeProc(pid, "uid_map", lines(m.uid)); err != nil {
		return err
	}
	return writeProc(pid, "gid_map", lines(m.gid))
}

// writeProc writes a file of pid in one go, as the kernel wants it.
func writeProc(pid int, name, text string) error {
	f, err := os.OpenFile(fmt.Sprintf("/proc/%d/%s", pid, name), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteString(text)
	return err
}

// lines formats a mapping for the kernel.
func lines(m []idRange) string {
	var b strings.Builder
	for _, r := range m {
		fmt.Fprintf(&b, "%d %d %d\n", r.inside, r.outside, r.count)
	}
	return b.String()
}

// runMapTools has newuidmap and newgidmap, which are privileged, write the mapping.
func runMapTools(pid int, m idMaps) error {
	errs := make([]error, 2)
	var both sync.WaitGroup
	both.Go(func() { errs[0] = runMapTool("newuidmap", pid, m.uid) })
	both.Go(func() { errs[1] = runMapTool("newgidmap", pid, m.gid) })
	both.Wait()
	if errs[0] != nil { // one line is enough: they fail for the same reason
		return errs[0]
	}
	return errs[1]
}

// runMapTool runs newuidmap(1) or newgidmap(1).
func runMapTool(tool string, pid int, m []idRange) error {
	args := []string{strconv.Itoa(pid)}
	for _, r := range m {
		for _, n := range []int64{r.inside, r.outside, r.count} {
			args = append(args, strconv.FormatInt(n, 10))
		}
	}
	out, err := exec.Command(tool, args...).CombinedOutput()
	if err == nil {
		return nil
	}
	if text, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n"); text != "" {
		err = errors.New(text)
	}
	return &Error{Op: "map users", On: tool, Err: err, Hint: tool + " must be setuid root or have its file capability, " +
		"no_new_privs must not be set, and the ranges of /etc/subuid and /etc/subgid must be yours alone"}
}

// userNamespaceError explains a clone(2) that refused a user namespace.
func userNamespaceError(err error) error {
	return &Error{Op: "create", On: "user namespace", Err: err, Hint: userNamespaceHint(err)}
}

// userNamespaceHint names the switch that keeps an ordinary user from a user namespace
// or, as AppArmor does, from its capabilities.
func userNamespaceHint(err error) string {
	switch {
	case errors.Is(err, unix.ENOSPC):
		return "raise the limit: sudo sysctl -w user.max_user_namespaces=28633"
	case sysctlIs("kernel/unprivileged_userns_clone", "0"):
		return "allow it: sudo sysctl -w kernel.unprivileged_userns_clone=1"
	case sysctlIs("user/max_user_namespaces", "0"):
		return "allow it: sudo sysctl -w user.max_user_namespaces=28633"
	case sysctlIs("kernel/apparmor_restrict_unprivileged_userns", "1"):
		return "AppArmor restricts it: sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0, or give slipway a profile with `userns,`"
	case errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES):
		return "the sandbox we run in (a container's seccomp profile, a chroot) forbids it; run slipway outside of it or as root"
	case errors.Is(err, unix.EINVAL):
		return "this kernel was built without CONFIG_USER_NS"
	}
	return ""
}

// sysctlIs tells whether a kernel setting exists and has this value.
func sysctlIs(name, value string) bool {
	b, err := os.ReadFile("/proc/sys/" + name)
	return err == nil && strings.TrimSpace(string(b)) == value
}
