package nsagent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// names keeps our own /etc/resolv.conf and /etc/hosts in the guest.
//
// A bind mount of our file covers the name in /etc itself. Where that is a symbolic
// link, the link is covered and not what it leads to: then it does not matter whether
// that exists (a dangling link), whether somebody writes it anew (systemd-resolved), or
// which of several names a program uses. mount(2) would follow the link; a descriptor
// of the link opened with O_PATH and O_NOFOLLOW does not.
//
// When the host replaces the name in /etc by rename(2) or removes it, the kernel takes
// away every mount on it in other namespaces. mountinfo has an exceptional condition then,
// as whenever a mount of the namespace changes (proc(5)), so we hear of an umount in the
// guest as well. The mount goes slightly before the new file comes, so we may have to try
// again. Programs in the guest can see the host's file for that moment, a millisecond or
// so. Only while a name is missing on the host we need inotify to learn when it is there;
// it is not made before, because closing it takes the kernel up to 20 ms.
type names struct {
	guest   *guest
	files   []nameFile
	state   []nameState
	info    int // mountinfo
	inotify int // of the directories of missing names, or -1
}

// nameFile is a name in the guest and the file of ours that appears there.
type nameFile struct{ path, ours string }

// nameState is what we know about one of the files.
type nameState struct {
	source  int         // descriptor of our file, O_PATH
	want    unix.Stat_t // of our file
	mountID string      // of our last mount, or empty
	problem string      // why it is not mounted, or empty
}

// retryAfter is the pause in milliseconds before trying again on a name that has just
// lost its mount and is about to be replaced.
const retryAfter = 1

// newNames takes the files that have something of ours.
func newNames(g *guest, files []nameFile) *names {
	n := &names{guest: g, inotify: -1}
	for _, f := range files {
		if f.ours != "" {
			n.files = append(n.files, f)
		}
	}
	return n
}

// start mounts the files and watches them as long as the process lives. It returns what
// could not be mounted and why.
func (n *names) start() (problems []string, err error) {
	if len(n.files) == 0 {
		return nil, nil
	}
	if n.info, err = unix.Open("/proc/self/mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		return nil, &Error{Op: "open", On: "/proc/self/mountinfo", Err: err}
	}
	n.state = make([]nameState, len(n.files))
	for i, f := range n.files {
		s := &n.state[i]
		if s.source, err = unix.Open(f.ours, unix.O_PATH|unix.O_CLOEXEC, 0); err != nil {
			return nil, &Error{Op: "open", On: f.ours, Err: err}
		}
		if err = unix.Fstat(s.source, &s.want); err != nil {
			return nil, &Error{Op: "stat", On: f.ours, Err: err}
		}
		if _, again := n.check(i); again { // it is being replaced just now
			n.check(i)
		}
		if s.problem != "" {
			problems = append(problems, f.path+": "+s.problem)
		}
	}
	go n.watch() // ends with the process
	return problems, nil
}

// watch mends mounts whenever something may have changed.
func (n *names) watch() {
	events := make([]byte, 4096)
	for wait := -1; ; {
		fds := []unix.PollFd{
			{Fd: int32(n.info), Events: unix.POLLPRI},
			{Fd: int32(n.inotify), Events: unix.POLLIN}, // ignored when negative, poll(2)
		}
		if _, err := unix.Poll(fds, wait); err != nil && !errors.Is(err, unix.EINTR) {
			n.guest.logf("watch of names ended", "/etc", err)
			return
		}
		for n.inotify >= 0 { // only the time of an event matters
			if _, err := unix.Read(n.inotify, events); err != nil {
				break
			}
		}
		wait = -1
		for i := range n.files {
			before := n.state[i].problem
			mended, again := n.check(i)
			if again {
				wait = retryAfter
			}
			n.report(i, before, mended)
		}
	}
}

// report logs a change.
func (n *names) report(i int, before string, mended bool) {
	now := n.state[i].problem
	switch {
	case mended:
		n.guest.logf("the host replaced a file; mounted ours again", n.files[i].path, nil)
	case now != before && now != "":
		n.guest.logf("the host's file shows in the guest", n.files[i].path, errors.New(now))
	}
}

// check mounts file i unless it is in place. again asks for another call soon.
func (n *names) check(i int) (mended, again bool) {
	f, s := n.files[i], &n.state[i]
	var st unix.Stat_t
	if err := unix.Stat(f.path, &st); err == nil && s.is(&st) {
		s.problem = ""
		return false, false
	}
	if s.mountID != "" && mounted(s.mountID, f.path) {
		s.problem = "something in the guest is mounted over it"
		return false, false
	}
	s.mountID = ""
	id, err := s.bind(f.path)
	switch {
	case errors.Is(err, unix.ENOENT) && (unix.Lstat(f.path, &st) == nil || n.await(f.path)):
		return false, true // about to be replaced, or just came
	case errors.Is(err, unix.ENOENT):
		s.problem = "the host has none; ours is mounted when one appears"
		return false, false
	case err != nil:
		s.problem = err.Error()
		return false, false
	}
	s.mountID, s.problem = id, ""
	return true, false
}

// await watches the directory of a missing name. It tells whether the name is there now.
func (n *names) await(path string) bool {
	if n.inotify < 0 {
		fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
		if err != nil {
			n.guest.logf("cannot watch for a missing file", path, err)
			return false
		}
		n.inotify = fd
	}
	if _, err := unix.InotifyAddWatch(n.inotify, filepath.Dir(path), unix.IN_CREATE|unix.IN_MOVED_TO); err != nil {
		n.guest.logf("cannot watch for a missing file", path, err)
		return false
	}
	var st unix.Stat_t
	return unix.Lstat(path, &st) == nil
}

// bind mounts our file on the very name path and returns the number of the mount. ENOENT
// means that the name is missing or was replaced meanwhile.
func (s *nameState) bind(path string) (string, error) {
	target, err := unix.Open(path, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	defer unix.Close(target)
	if err := unix.Mount(fdPath(s.source), fdPath(target), "", unix.MS_BIND, ""); err != nil {
		return "", fmt.Errorf("mount: %w", err)
	}
	top, err := unix.Open(path, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	defer unix.Close(top)
	var st unix.Stat_t
	if err := unix.Fstat(top, &st); err != nil {
		return "", err
	}
	if !s.is(&st) { // replaced since: what we opened is on another mount
		return "", unix.ENOENT
	}
	return mountID(top)
}

// is tells whether st is of our file.
func (s *nameState) is(st *unix.Stat_t) bool { return st.Dev == s.want.Dev && st.Ino == s.want.Ino }

// fdPath is a path to what fd refers to.
func fdPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// mountID returns the number that mountinfo has for the mount fd was opened on.
func mountID(fd int) (string, error) {
	b, err := os.ReadFile("/proc/self/fdinfo/" + strconv.Itoa(fd))
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "mnt_id:"); ok {
			return strings.TrimSpace(v), nil
		}
	}
	return "", errors.New("fdinfo has no mnt_id")
}

// mounted tells whether a mount is still there; the kernel gives its number to another
// soon after it is gone. When it cannot be told it is not.
func mounted(id, point string) bool {
	list, err := readMounts()
	if err != nil {
		return false
	}
	return slices.ContainsFunc(list, func(m mount) bool {
		return strconv.Itoa(m.id) == id && m.point == point
	})
}
