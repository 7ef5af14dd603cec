package nsagent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"time"

	"github.com/fsnotify/fsnotify"
	"golang.org/x/sys/unix"
)

// Joining. The agent is started through nsenter(1) of util-linux, which is a program
// with one thread and may therefore enter a user namespace. It gets descriptors of the
// namespaces, opened and checked by us, so that a process number that is used again
// meanwhile does no harm.

// name is the namespace for messages.
func (j *Join) name() string {
	if j.PID != 0 {
		return "process " + strconv.Itoa(j.PID)
	}
	return j.NetNS
}

// procPath matches names of a process's namespace, which no inotify watches.
var procPath = regexp.MustCompile(`^/proc/([0-9]+)/(?:task/[0-9]+/)?ns/net$`)

// spawnJoined starts the agent in the namespace of spec.Join and prepares watching it.
func (a *Agent) spawnJoined() (err error) {
	j := a.spec.Join
	nsenter, err := exec.LookPath("nsenter")
	if err != nil {
		return &Error{Op: "attach", On: j.name(), Err: errors.New("nsenter is not installed"), Hint: "Debian, Ubuntu: apt-get install util-linux"}
	}
	if a.watch, err = j.watcher(); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			a.watch.close()
		}
	}()
	netns, err := j.open()
	if err != nil {
		return err
	}
	defer netns.Close()
	program, err := os.OpenFile(selfExe, unix.O_PATH, 0)
	if err != nil {
		return &Error{Op: "open", On: selfExe, Err: err}
	}
	defer program.Close()
	owner, err := ownerToEnter(netns)
	if err != nil {
		return &Error{Op: "attach", On: j.name(), Err: err}
	}
	// Extra files become 4, 5, 6 in the child.
	extra := []*os.File{program, netns}
	args := []string{"nsenter", "--net=" + fdPath(5)}
	if owner != nil {
		defer owner.Close()
		extra = append(extra, owner)
		args = append(args, "--user="+fdPath(6), "--preserve-credentials")
	}
	args = append(args, "--", fdPath(4), agentName)
	if err := a.fork(nsenter, args, extra, nil); err != nil {
		return &Error{Op: "run", On: "nsenter", Err: err}
	}
	return nil
}

// open opens the network namespace.
func (j *Join) open() (*os.File, error) {
	path, hint := j.NetNS, "name a file such as /run/netns/NAME"
	if j.PID != 0 {
		path, hint = fmt.Sprintf("/proc/%d/ns/net", j.PID), "run slipway as the user of that process, or as root"
	}
	f, err := os.Open(path)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			hint = ""
		}
		return nil, &Error{Op: "attach", On: j.name(), Err: errors.Unwrap(err), Hint: hint}
	}
	fd, err := rawFD(f)
	if err == nil {
		var kind int
		kind, err = unix.IoctlRetInt(fd, unix.NS_GET_NSTYPE)
		if err == nil && kind != unix.CLONE_NEWNET {
			err = errors.New("another kind of namespace")
		}
	}
	if err != nil {
		f.Close()
		return nil, &Error{Op: "attach", On: j.name(), Err: errors.New("not a network namespace"), Hint: hint}
	}
	if same, err := sameFile(f, "/proc/self/ns/net"); same || err != nil {
		f.Close()
		if err == nil {
			err = errors.New("it is in slipway's own network namespace")
		}
		return nil, &Error{Op: "attach", On: j.name(), Err: err, Hint: "name a process or a file of the namespace to serve"}
	}
	return f, nil
}

// ownerToEnter returns the user namespace that owns netns if we must enter it to have
// rights in there. Root has them in every namespace below its own without that, and
// would lose them on the way if it is not one of its users.
func ownerToEnter(netns *os.File) (*os.File, error) {
	fd, err := rawFD(netns)
	if err != nil {
		return nil, err
	}
	n, err := unix.IoctlRetInt(fd, unix.NS_GET_USERNS)
	if errors.Is(err, unix.EPERM) {
		return nil, errors.New("its user namespace is not below ours")
	}
	if err != nil {
		return nil, err
	}
	owner := os.NewFile(uintptr(n), "user namespace")
	same, err := sameFile(owner, "/proc/self/ns/user")
	if err == nil && !same && os.Geteuid() != 0 {
		return owner, nil
	}
	owner.Close()
	return nil, err
}

// sameFile tells whether f and path are one file.
func sameFile(f *os.File, path string) (bool, error) {
	a, err := f.Stat()
	if err != nil {
		return false, err
	}
	b, err := os.Stat(path)
	if err != nil {
		return false, err
	}
	return os.SameFile(a, b), nil
}

// watcher tells when a joined namespace is gone.
type watcher struct {
	pidfd  *os.File          // of the process that stands for it, or nil
	path   string            // otherwise the file
	was    os.FileInfo       // what it was when we joined
	events *fsnotify.Watcher // of the file's directory
}

// watcher opens what tells of the end, before we join.
func (j *Join) watcher() (*watcher, error) {
	pid := j.PID
	if m := procPath.FindStringSubmatch(j.NetNS); m != nil {
		pid, _ = strconv.Atoi(m[1])
	}
	if pid != 0 {
		fd, err := unix.PidfdOpen(pid, 0)
		if err == nil {
			err = unix.SetNonblock(fd, true) // for Go's netpoller; PIDFD_NONBLOCK is younger
		}
		if err != nil {
			return nil, &Error{Op: "attach", On: j.name(), Err: err}
		}
		return &watcher{pidfd: os.NewFile(uintptr(fd), "pidfd")}, nil
	}
	was, err := os.Stat(j.NetNS)
	if err != nil {
		return nil, &Error{Op: "attach", On: j.name(), Err: errors.Unwrap(err)}
	}
	w, err := fsnotify.NewWatcher()
	if err == nil {
		if err = w.Add(filepath.Dir(j.NetNS)); err != nil {
			w.Close()
		}
	}
	if err != nil {
		return nil, &Error{Op: "watch", On: filepath.Dir(j.NetNS), Err: err}
	}
	return &watcher{path: j.NetNS, was: was, events: w}, nil
}

// unmountPoll is how often we look whether a namespace file was unmounted but not
// removed, of which no event tells. `ip netns del` does both.
const unmountPoll = 2 * time.Second

// run returns nil when the namespace is gone or when ctx ends, and releases w.
func (w *watcher) run(ctx context.Context) error {
	defer w.close()
	if w.pidfd != nil {
		return w.awaitProcess(ctx)
	}
	tick := time.NewTicker(unmountPoll)
	defer tick.Stop()
	for {
		now, err := os.Stat(w.path)
		if err != nil || !os.SameFile(w.was, now) {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case <-w.events.Events:
		case err := <-w.events.Errors: // an overflow: events were lost
			if err != nil && !errors.Is(err, fsnotify.ErrEventOverflow) {
				return err
			}
		}
	}
}

// awaitProcess waits until the pidfd is readable: the process has ended.
func (w *watcher) awaitProcess(ctx context.Context) error {
	defer context.AfterFunc(ctx, func() { w.pidfd.SetReadDeadline(time.Unix(1, 0)) })()
	c, err := w.pidfd.SyscallConn()
	if err != nil {
		return err
	}
	var perr error
	err = c.Read(func(fd uintptr) bool {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(p, 0)
		if err != nil && !errors.Is(err, unix.EINTR) {
			perr = err
			return true
		}
		return n > 0
	})
	if ctx.Err() != nil {
		return nil
	}
	return errors.Join(err, perr)
}

// close releases what run did not.
func (w *watcher) close() {
	if w.pidfd != nil {
		w.pidfd.Close()
	}
	if w.events != nil {
		w.events.Close()
	}
}
