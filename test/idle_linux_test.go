package test

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/slipway-net/slipway/test/topo"
	"golang.org/x/sys/unix"
)

// TestIdleFlows holds flows that say nothing: each costs the daemon at most two
// descriptors and 40 KiB, 8 KiB on the kernel path, and all still work at the end.
func TestIdleFlows(t *testing.T) { holdFlows(t, 1000) }

// TestLongIdleFlows is TestIdleFlows with the number of DESIGN section 9.
func TestLongIdleFlows(t *testing.T) {
	long(t)
	holdFlows(t, 10_000)
}

func holdFlows(t *testing.T, count int) {
	const fdsEach = 2
	need(t, "ip", "nft")
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil || int(l.Max) < count+1000 {
		missing(t, "%d open files, the limit is %d", count+1000, l.Max)
	}
	for _, k := range kinds {
		if k.native {
			continue
		}
		t.Run(k.name, func(t *testing.T) {
			g := newGuest(t, newTopology(t), k, engineOptions{noCapture: true})
			count, memoryEach := count, 40<<10
			if k.kernel() {
				memoryEach = 8 << 10
				// Two descriptors each, and dials leave 512 for the rest of slipway.
				count = min(count, (int(l.Max)-1000)/fdsEach)
			}
			a := echoProcess(t, g.net.World, at(families[0].world, 0))
			held := make([]net.Conn, 0, count)
			defer func() {
				for _, c := range held {
					c.Close()
				}
			}()
			open := func(n int) {
				if err := g.ns.Do(func() error {
					for range n {
						c, err := net.DialTimeout("tcp", a, 10*time.Second)
						if err != nil {
							return fmt.Errorf("flow %d: %w", len(held), err)
						}
						held = append(held, c)
					}
					return nil
				}); err != nil {
					t.Fatal(err)
				}
				for _, c := range held[len(held)-n:] {
					roundTrip(t, c)
				}
			}
			open(10)
			fds, rss := descriptors(t, g.engine), memory(t, g.engine)
			open(count - 10)
			fds, rss = descriptors(t, g.engine)-fds, memory(t, g.engine)-rss
			t.Logf("each of %d flows: %.2f descriptors, %.1f KiB", count, float64(fds)/float64(count), float64(rss)/float64(count)/1024)
			if fds > fdsEach*count || rss > memoryEach*count+4<<20 {
				t.Errorf("%d flows take %d descriptors and %d KiB each", count, fds, rss/count>>10)
			}
			for _, c := range held {
				roundTrip(t, c)
			}
		})
	}
}

func roundTrip(t testing.TB, c net.Conn) {
	t.Helper()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	b := []byte("x")
	if _, err := c.Write(b); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, b); err != nil {
		t.Fatal(err)
	}
}

func descriptors(t testing.TB, e *engine) int {
	t.Helper()
	all, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", e.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

// echoProcess echoes TCP connections in a process of its own, which has its own
// limit of descriptors. It returns the address.
func echoProcess(t testing.TB, ns *topo.NS, address string) string {
	t.Helper()
	l, err := ns.Listen(address)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	file, err := l.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), envInner+"="+roleEcho)
	cmd.ExtraFiles = []*os.File{file}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	return l.Addr().String()
}

// echo is that process: it serves the listener at descriptor 3 until it is killed.
func echo() int {
	l, err := net.FileListener(os.NewFile(3, "listener"))
	for err == nil {
		var c net.Conn
		if c, err = l.Accept(); err == nil {
			go func() {
				defer c.Close()
				// No splice, which takes two more descriptors.
				io.CopyBuffer(struct{ io.Writer }{c}, struct{ io.Reader }{c}, make([]byte, 512))
			}()
		}
	}
	fmt.Fprintln(os.Stderr, "echo:", err)
	return 1
}
