//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// The run changes nothing on the machine: the harness starts itself again as the
// first process of a new pid namespace and in a new mount namespace. When it
// ends, even by kill -9, the kernel ends every process in it, and with them the
// network namespaces, devices and mounts. Inside:
//
//   - /run is an empty tmpfs: /run/netns and the run directories of the drivers
//     are ours alone;
//   - /etc/passwd, group, subuid and subgid are copies with one more user, whose
//     subordinate ids rootless drivers use;
//   - /dev/net/tun is open to that user, as it is on most distributions.
//
// One thing is the whole machine's and is put back: which congestion controls an
// unprivileged namespace may choose.

// The ordinary user of rootless drivers exists only inside our mount namespace.
const (
	benchUser  = "slipbench"
	benchUID   = 61234
	benchSubID = 1 << 20 // first of 65536 subordinate ids
)

// allowedCongestion lists what namespaces other than the first may choose.
const allowedCongestion = "/proc/sys/net/ipv4/tcp_allowed_congestion_control"

// runOuter prepares what needs the machine as it is (packages, binaries) and
// then runs the harness inside its namespaces.
func runOuter(ctx context.Context, opt options, args []string) error {
	if os.Geteuid() != 0 {
		return errors.New("namespaces on this host: the benchmarks need root; hint: sudo make bench")
	}
	installPackages(ctx)
	dir, err := os.MkdirTemp("", "slipway-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil { // the ordinary user reads it
		return err
	}
	if err := prepareBinaries(ctx, opt, dir); err != nil {
		return err
	}
	restore := allowCubic()
	defer restore()

	runtime.LockOSThread() // Pdeathsig follows the thread that started the child
	cmd := exec.CommandContext(ctx, filepath.Join(dir, "bench"), append([]string{argInner}, args...)...)
	cmd.Env = append(os.Environ(), "SLIPBENCH_DIR="+dir)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = nil, os.Stdout, os.Stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) }
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWIPC,
		Pdeathsig:  unix.SIGKILL,
	}
	if err := cmd.Run(); err != nil {
		var status *exec.ExitError
		if errors.As(err, &status) {
			return fmt.Errorf("the run inside its namespaces: %w", err)
		}
		return fmt.Errorf("namespaces on this host: %w", err)
	}
	return nil
}

// allowCubic lets namespaces choose cubic and returns what undoes that.
func allowCubic() (restore func()) {
	old, err := os.ReadFile(allowedCongestion)
	if err != nil || strings.Contains(string(old), congestion) {
		return func() {}
	}
	wanted := strings.TrimSpace(string(old)) + " " + congestion
	if err := os.WriteFile(allowedCongestion, []byte(wanted), 0); err != nil {
		fmt.Fprintf(os.Stderr, "bench: %s cannot be chosen in namespaces: %v\n", congestion, err)
		return func() {}
	}
	return func() { _ = os.WriteFile(allowedCongestion, old, 0) }
}

// settleIn makes the mount namespace of the inner harness what is said above.
func settleIn(dir string) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	if err := unix.Mount("tmpfs", "/run", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755"); err != nil {
		return fmt.Errorf("mount /run: %w", err)
	}
	if err := openTun(); err != nil {
		return err
	}
	for path, line := range map[string]string{
		"/etc/passwd": fmt.Sprintf("%s:x:%d:%d::%s:/bin/sh\n", benchUser, benchUID, benchUID, userDir(dir)),
		"/etc/group":  fmt.Sprintf("%s:x:%d:\n", benchUser, benchUID),
		"/etc/subuid": fmt.Sprintf("%s:%d:65536\n", benchUser, benchSubID),
		"/etc/subgid": fmt.Sprintf("%s:%d:65536\n", benchUser, benchSubID),
	} {
		if err := appendPrivately(dir, path, line); err != nil {
			return err
		}
	}
	for _, d := range []string{userDir(dir), filepath.Join(userDir(dir), "run")} {
		if err := os.Mkdir(d, 0o700); err != nil {
			return err
		}
		if err := os.Chown(d, benchUID, benchUID); err != nil {
			return err
		}
	}
	moreFiles()
	return nil
}

// moreFiles lifts the hard limit of open files where that is allowed, for the idle
// row: a driver may need two per flow.
func moreFiles() {
	if roomFor(fileLimit()) >= idleCount+activeCount {
		return
	}
	more := unix.Rlimit{Cur: 1 << 20, Max: 1 << 20}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &more); err != nil {
		fmt.Fprintf(os.Stderr, "bench: limit of %d open files: %v; the idle rows hold %d flows\n", fileLimit(), err, roomFor(fileLimit()))
	}
}

// fileLimit returns how many files a process may have open here.
func fileLimit() uint64 {
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		return 0
	}
	return lim.Max
}

// userDir is the home of the ordinary user.
func userDir(dir string) string { return filepath.Join(dir, "home") }

// openTun puts a device node that everybody may open over /dev/net/tun.
func openTun() error {
	const dev = "/dev/net/tun"
	var st unix.Stat_t
	if err := unix.Stat(dev, &st); err != nil {
		return fmt.Errorf("stat %s: %w; hint: modprobe tun", dev, err)
	}
	if st.Mode&0o666 == 0o666 {
		return nil
	}
	if err := unix.Mount("tmpfs", "/dev/net", "tmpfs", unix.MS_NOSUID, "mode=755"); err != nil {
		return fmt.Errorf("mount /dev/net: %w", err)
	}
	if err := unix.Mknod(dev, unix.S_IFCHR|0o666, int(st.Rdev)); err != nil {
		return fmt.Errorf("mknod %s: %w", dev, err)
	}
	return os.Chmod(dev, 0o666)
}

// appendPrivately bind-mounts a copy of path with one more line over it.
func appendPrivately(dir, path, line string) error {
	old, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%s: %w; hint: apt-get install uidmap", path, err)
	}
	if err != nil {
		return err
	}
	name := filepath.Join(dir, filepath.Base(path))
	if err := os.WriteFile(name, append(old, line...), 0o644); err != nil {
		return err
	}
	if err := unix.Mount(name, path, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind over %s: %w", path, err)
	}
	return nil
}

// copyFile copies an executable to where the ordinary user can run it.
func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}
