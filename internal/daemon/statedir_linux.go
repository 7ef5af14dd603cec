package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"

	"golang.org/x/sys/unix"
)

// Theory of operation.
//
// Every running engine has a directory ROOT/NAME with a file "lock" that its daemon
// keeps locked (flock(2)); the kernel drops the lock with the daemon, however it ends.
// So a directory whose lock is free is stale, whatever its age, and the next start
// clears it. The agent has the lock of a second file, "guest", too, and lives until the
// last process of the guest has ended: after kill -9 of the daemon that takes as long as
// the guest has time to stop, and the next start waits. Two dockerds on the same files
// would ruin them. ROOT itself is locked for the moment in which a directory is made or
// removed: else one start could lock a file that another is about to delete. ROOT is
// removed with the last engine.

// stateDir is an engine's directory, held by this process.
type stateDir struct {
	root, path string
	lock       *os.File
	guest      *os.File
}

// Errors of openState, wrapped with the name.
var (
	// ErrRunning says that an engine of that name is running.
	ErrRunning = errors.New("already running")
	// ErrEnding says that slipway was killed, and the guest is about to end.
	ErrEnding = errors.New("the guest of a slipway that was killed has not ended yet")
	// ErrNotOurs says that a directory belongs to somebody else, or others may
	// write to it.
	ErrNotOurs = errors.New("not a private directory of this user")
	// ErrName says that a name cannot be an engine's.
	ErrName = errors.New("a name has 1 to 32 of a-z, A-Z, 0-9, '.', '_' and '-', and starts with a letter or a digit")
)

var validName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9._-]{0,31}$`)

// stateRoot is where this user's engines live: /run/slipway for root, else under
// XDG_RUNTIME_DIR, else under a directory of the user's in the temporary one. Root of a
// user namespace that an ordinary user made is no root to /run.
func stateRoot() string {
	if os.Geteuid() == 0 && unix.Access("/run", unix.W_OK) == nil {
		return "/run/slipway"
	}
	if d := os.Getenv("XDG_RUNTIME_DIR"); filepath.IsAbs(d) {
		return filepath.Join(d, "slipway")
	}
	return filepath.Join(os.TempDir(), fmt.Sprintf("slipway-%d", os.Geteuid()))
}

// openState makes and locks the directory of the engine called name, clearing what a
// dead one left.
func openState(root, name string) (*stateDir, error) {
	if !validName.MatchString(name) {
		return nil, fmt.Errorf("open state of engine %q: %w", name, ErrName)
	}
	unlock, err := lockRoot(root)
	if err != nil {
		return nil, fmt.Errorf("open state of engine %s: %w", name, err)
	}
	defer unlock()
	s := &stateDir{root: root, path: filepath.Join(root, name)}
	if err := s.open(); err != nil {
		return nil, fmt.Errorf("open state of engine %s: %w", name, err)
	}
	return s, nil
}

// open does the work of openState with the root locked.
func (s *stateDir) open() (err error) {
	if err := privateDir(s.path); err != nil {
		return err
	}
	if s.lock, err = s.take("lock", ErrRunning); err != nil {
		return err
	}
	if s.guest, err = s.take("guest", ErrEnding); err == nil {
		err = s.clear()
	}
	if err != nil {
		s.release()
	}
	return err
}

// take locks a file of the directory, or fails with taken.
func (s *stateDir) take(name string, taken error) (*os.File, error) {
	f, err := os.OpenFile(s.file(name), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	switch err {
	case nil:
		return f, nil
	case unix.EWOULDBLOCK:
		err = taken
	default:
		err = fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	f.Close()
	return nil, err
}

// release lets go of the locks.
func (s *stateDir) release() error {
	var err error
	if s.guest != nil {
		err = s.guest.Close()
	}
	return errors.Join(err, s.lock.Close())
}

// clear removes everything but the locks.
func (s *stateDir) clear() error {
	entries, err := os.ReadDir(s.path)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() == "lock" || e.Name() == "guest" {
			continue
		}
		if err := os.RemoveAll(s.file(e.Name())); err != nil {
			return err
		}
	}
	return nil
}

// file returns the path of a file in the directory.
func (s *stateDir) file(name string) string { return filepath.Join(s.path, name) }

// write replaces a file in place: bind mounts of it follow. Other users than ours read
// it inside, whatever our umask is; on the host the directory keeps them out.
func (s *stateDir) write(name string, b []byte) error {
	const mode = 0o644
	if err := os.WriteFile(s.file(name), b, mode); err != nil {
		return err
	}
	return os.Chmod(s.file(name), mode)
}

// Close removes the directory and lets go of the name.
func (s *stateDir) Close() error {
	unlock, err := lockRoot(s.root)
	if err != nil {
		return errors.Join(err, s.release())
	}
	defer unlock()
	err = os.RemoveAll(s.path)
	os.Remove(s.root) // fails while another engine runs
	return errors.Join(err, s.release())
}

// lockRoot makes root and locks it; the caller calls unlock soon.
func lockRoot(root string) (unlock func(), err error) {
	for {
		if err := privateDir(root); err != nil {
			return nil, err
		}
		unlock, err := lockDir(root)
		if !errors.Is(err, fs.ErrNotExist) { // removed with the last engine, between the two calls
			return unlock, err
		}
	}
}

// lockDir locks a root that is there.
func lockDir(root string) (unlock func(), err error) {
	for {
		f, err := os.OpenFile(root, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
		if err != nil {
			return nil, err
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", root, err)
		}
		// Whoever held the lock may have removed the directory.
		if same(f, root) {
			return func() { f.Close() }, nil
		}
		f.Close()
	}
}

func same(f *os.File, path string) bool {
	a, err := f.Stat()
	if err != nil {
		return false
	}
	b, err := os.Lstat(path)
	return err == nil && os.SameFile(a, b)
}

// privateDir makes a directory that only we can use, or checks that it is one.
func privateDir(path string) error {
	err := os.Mkdir(path, 0o700)
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err = checkPrivate(path); errors.Is(err, fs.ErrNotExist) { // removed meanwhile by its last user
		return privateDir(path)
	}
	return err
}

// checkPrivate returns nil if path is a directory that only we can use.
func checkPrivate(path string) error {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return fmt.Errorf("stat %s: %w", path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR || st.Uid != uint32(os.Geteuid()) || st.Mode&0o077 != 0 {
		return fmt.Errorf("%s: %w", path, ErrNotOurs)
	}
	return nil
}

// checkRoot returns an error if somebody else may have put engines below root, which can
// be a well-known name in a directory open to everybody. An exec would give them our
// environment and our terminal.
func checkRoot(root string) error {
	if err := checkPrivate(root); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return withHint(fmt.Errorf("look for engines on %w", err))
	}
	return nil
}

// Engines returns the names of this user's running engines, in alphabetical order.
func Engines() ([]string, error) { return enginesIn(stateRoot()) }

func enginesIn(root string) ([]string, error) {
	entries, err := os.ReadDir(root)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list engines on %s: %w", root, err)
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() && locked(filepath.Join(root, e.Name(), "lock")) {
			names = append(names, e.Name())
		}
	}
	slices.Sort(names)
	return names, nil
}

// locked reports whether somebody holds the lock. It asks with a shared lock, which a
// starting daemon may mistake for an owner's only if it asks at the same moment; hence
// the root's lock.
func locked(path string) bool {
	root := filepath.Dir(filepath.Dir(path))
	if checkPrivate(root) != nil {
		return false
	}
	unlock, err := lockDir(root)
	if err != nil {
		return false
	}
	defer unlock()
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	return unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB) == unix.EWOULDBLOCK
}
