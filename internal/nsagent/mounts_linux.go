package nsagent

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// mounts makes the guest's mount namespace. None of it is seen outside: mounts here are
// never in one group with the host's.
func (g *guest) mounts(r *Report) error {
	if err := g.propagation(); err != nil {
		return &Error{Op: "set mount propagation", On: "/", Err: err}
	}
	if g.spec.PIDNamespace {
		if err := freshMount("proc", "/proc"); err != nil {
			return &Error{Op: "mount proc", On: "/proc", Err: err,
				Hint: "the kernel allows it only where the whole of /proc is visible; leave pid out of --isolate"}
		}
	}
	if err := freshMount("sysfs", "/sys"); err != nil {
		r.Sys = err.Error()
	}
	g.names = newNames(g, []nameFile{{"/etc/resolv.conf", g.spec.ResolvConf}, {"/etc/hosts", g.spec.Hosts}})
	var err error
	r.Names, err = g.names.start()
	return err
}

// propagation decides which mounts pass the border of the namespace. A slave receives
// the host's; sharing it on top passes them to containers in the guest, as on a host
// run by systemd.
func (g *guest) propagation() error {
	if g.spec.PrivateMounts {
		return unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return err
	}
	return unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, "")
}

// freshMount mounts a file system of the kernel anew over an old mount of it, so that it
// shows our own namespaces, and brings along what was mounted inside the old one: for
// /sys that is above all /sys/fs/cgroup in all its forms, without which dockerd does not
// start. What the host mounts in there later stays hidden.
//
// A descriptor opened with O_PATH before leads to the old mounts after they are covered,
// by /proc/self/fd. This needs no mount API newer than bind mounts. The old mount cannot
// be taken away instead: in a user namespace it is locked.
func freshMount(fstype, target string) error {
	inside, err := mountsInside(target)
	if err != nil {
		return err
	}
	olds := make([]int, 0, len(inside))
	defer func() {
		for _, fd := range olds {
			unix.Close(fd)
		}
	}()
	kept := inside[:0]
	for _, path := range inside {
		fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
		if err != nil {
			continue // nobody in here can reach it either
		}
		olds = append(olds, fd)
		kept = append(kept, path)
	}
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	err = unix.Mount(fstype, target, fstype, flags, "")
	if errors.Is(err, unix.EPERM) { // in a user namespace no flag may be weaker than before
		err = unix.Mount(fstype, target, fstype, flags|unix.MS_RDONLY, "")
	}
	if err != nil {
		return fmt.Errorf("mount %s: %w", fstype, err)
	}
	var errs []error
	for i, path := range kept {
		err := unix.Mount(fmt.Sprintf("/proc/self/fd/%d", olds[i]), path, "", unix.MS_BIND|unix.MS_REC, "")
		if err != nil {
			errs = append(errs, fmt.Errorf("mount %s again: %w", path, err))
		}
	}
	return errors.Join(errs...)
}

// mountsInside lists the mount points directly inside the mount at path, each of them
// once, in the order they were mounted.
func mountsInside(path string) ([]string, error) {
	list, err := readMounts()
	if err != nil {
		return nil, err
	}
	top := -1
	for _, m := range list {
		if m.point == path {
			top = m.id // the last one covers the others
		}
	}
	if top < 0 {
		return nil, fmt.Errorf("%s is not a mount point", path)
	}
	var inside []string
	for _, m := range list {
		if m.parent == top {
			inside = append(inside, m.point)
		}
	}
	return inside, nil
}

// mount is a line of mountinfo, see proc(5).
type mount struct {
	id, parent int
	point      string
}

// readMounts lists the mounts of our namespace.
func readMounts() ([]mount, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var list []mount
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 5 {
			continue
		}
		id, err1 := strconv.Atoi(f[0])
		parent, err2 := strconv.Atoi(f[1])
		if err1 == nil && err2 == nil {
			list = append(list, mount{id, parent, unescape.Replace(f[4])})
		}
	}
	return list, nil
}

// unescape undoes the escapes of mountinfo.
var unescape = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
