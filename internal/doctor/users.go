package doctor

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"syscall"
)

const (
	// wantIDs is what images use: 0 to 65535, of which 0 is the user.
	wantIDs = 65535
	// newIDs is how many useradd gives (SUB_UID_COUNT), from firstID on (SUB_UID_MIN).
	newIDs, firstID = 65536, 100_000
)

// userNamespaces is asked for a rootless engine.
func (h *host) userNamespaces(tried trialReport, err error) Finding {
	f := Finding{Name: "user namespaces", Status: OK, Detail: "one could be made"}
	denied := err == nil && (tried.TUNDenied || tried.NFTDenied)
	if err == nil && !denied {
		return f
	}
	if f.Detail, f.Fix = h.noUserNamespaces(err); f.Detail != "" {
		f.Status = Fail
		return f
	}
	switch {
	case errors.Is(err, errNoAnswer):
		f.Status, f.Detail = Warn, "cannot tell: "+err.Error()
	case denied:
		f.Status, f.Detail = Fail, "one can be made, but its root has no capabilities: a security module forbids it"
	case errors.Is(err, syscall.EPERM):
		f.Status, f.Detail = Fail, "not permitted here (a container's seccomp profile, or a chroot)"
	default:
		f.Status, f.Detail = Fail, fmt.Sprintf("none can be made: %v", err)
	}
	return f
}

// noUserNamespaces looks for the setting that forbids them; detail is empty if it is
// none that we know.
func (h *host) noUserNamespaces(err error) (detail, fix string) {
	const (
		limit, limitNet = "user.max_user_namespaces", "user.max_net_namespaces"
		debian          = "kernel.unprivileged_userns_clone"
		apparmor        = "kernel.apparmor_restrict_unprivileged_userns"
		someNamespaces  = "15000" // about a kernel's default with 4 GiB of memory
	)
	switch {
	case h.sysctl(limit) == "0":
		return limit + " is 0", h.setSysctl(limit, someNamespaces)
	case h.sysctl(limitNet) == "0":
		return limitNet + " is 0", h.setSysctl(limitNet, someNamespaces)
	case errors.Is(err, syscall.ENOSPC): // user_namespaces(7); also if nested 32 deep
		n, _ := strconv.Atoi(h.sysctl(limit))
		return fmt.Sprintf("%s, %d, is used up", limit, n), h.setSysctl(limit, strconv.Itoa(2*n))
	case h.euid == 0: // the others are for ordinary users
	case h.sysctl(debian) == "0":
		return debian + " is 0", h.setSysctl(debian, "1")
	case h.sysctl(apparmor) == "1":
		return "AppArmor takes their capabilities away (" + apparmor + ")", h.setSysctl(apparmor, "0")
	}
	return "", ""
}

// subordinateIDs are for users inside other than root. Without them the guest has one
// single user.
func (h *host) subordinateIDs() Finding {
	const effect = "there is only one user inside, which most images do not take"
	f := Finding{Name: "subordinate ids", Status: Warn}
	for _, tool := range []string{"newuidmap", "newgidmap"} {
		if h.euid == 0 {
			break // root writes the mapping itself
		}
		path, err := h.lookPath(tool)
		if err != nil {
			f.Detail, f.Fix = tool+" is not installed: "+effect, h.install(tool)
			return f
		}
		if !h.privileged(path) {
			f.Detail, f.Fix = path+" is neither set-uid nor has file capabilities: "+effect, h.sudo("chmod u+s "+path)
			return f
		}
	}
	uids, nextUID := h.idRanges("/etc/subuid")
	gids, nextGID := h.idRanges("/etc/subgid")
	switch {
	case uids >= wantIDs && gids >= wantIDs:
		f.Status, f.Detail = OK, fmt.Sprintf("%d users and %d groups for %s", uids, gids, h.name())
	case h.euid == 0 && uids == 0 && gids == 0:
		f.Status, f.Detail = OK, "none for root, who maps its own"
	default:
		f.Detail = fmt.Sprintf("%d users in /etc/subuid and %d groups in /etc/subgid for %s, %d are needed: %s", uids, gids, h.name(), wantIDs, effect)
		if uids > 0 || gids > 0 {
			f.Detail = strings.TrimSuffix(f.Detail, ": "+effect) + ": images with higher ids do not unpack"
		}
		f.Fix = h.sudo("usermod")
		if uids < wantIDs {
			f.Fix += fmt.Sprintf(" --add-subuids %d-%d", nextUID, nextUID+newIDs-1)
		}
		if gids < wantIDs {
			f.Fix += fmt.Sprintf(" --add-subgids %d-%d", nextGID, nextGID+newIDs-1)
		}
		f.Fix += " " + h.name()
	}
	return f
}

// idRanges reads a file in the form of subuid(5): how many ids are the user's, and from
// where on nobody has any.
func (h *host) idRanges(path string) (mine, next uint64) {
	next = firstID
	b, err := h.readFile(path)
	if err != nil {
		return 0, next
	}
	for line := range strings.Lines(string(b)) {
		words := strings.Split(strings.TrimSpace(line), ":")
		if len(words) != 3 {
			continue
		}
		first, err1 := strconv.ParseUint(words[1], 10, 32)
		count, err2 := strconv.ParseUint(words[2], 10, 32)
		if err1 != nil || err2 != nil {
			continue
		}
		next = max(next, first+count)
		if words[0] == h.user && h.user != "" || words[0] == strconv.Itoa(h.euid) {
			mine += count
		}
	}
	return mine, next
}

// name is the user's name or number.
func (h *host) name() string {
	if h.user != "" {
		return h.user
	}
	return strconv.Itoa(h.euid)
}
