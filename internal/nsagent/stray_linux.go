package nsagent

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// agents are this process's own agents. The lock is held over a fork, so that whoever
// sees a new child of ours and asks gets the right answer.
var agents = struct {
	mu   sync.RWMutex
	pids map[int]bool
}{pids: make(map[int]bool)}

// killPoll is how often we look again for processes that should be gone.
const killPoll = 5 * time.Millisecond

// killStrays kills what an agent that was killed itself has left: its orphans have
// become our children, since we are a child subreaper. They differ from other children
// by living in another network namespace, by not being an agent, and by not being in
// others, which we had before. What they have started themselves becomes our child in
// turn. It returns how many were killed.
func killStrays(others []int, limit time.Duration) (int, error) {
	own, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		return 0, err
	}
	total := 0
	killed := make(map[int]bool) // and not reaped yet
	for deadline := time.Now().Add(limit); ; time.Sleep(killPoll) {
		left := 0
		for _, pid := range directChildren() {
			if !killed[pid] && (slices.Contains(others, pid) || !isStray(pid, own)) {
				continue
			}
			left++
			if !killed[pid] {
				total++
				killed[pid] = true
			}
			unix.Kill(pid, unix.SIGKILL)
			if got, _ := unix.Wait4(pid, nil, unix.WNOHANG, nil); got == pid {
				delete(killed, pid) // the number may be used again
			}
		}
		if left == 0 {
			return total, nil
		}
		if time.Now().After(deadline) {
			return total, fmt.Errorf("%d processes cannot be killed", left)
		}
	}
}

// isStray tells whether our child pid came from an agent.
func isStray(pid int, ownNet string) bool {
	agents.mu.RLock()
	defer agents.mu.RUnlock()
	if agents.pids[pid] {
		return false
	}
	net, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", pid))
	return err == nil && net != ownNet
}

// directChildren lists our direct children, dead ones too.
func directChildren() []int {
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return nil
	}
	var pids []int
	for _, t := range tasks { // each thread has its own children
		b, err := os.ReadFile("/proc/self/task/" + t.Name() + "/children")
		if errors.Is(err, os.ErrNotExist) && t.Name() == strconv.Itoa(os.Getpid()) {
			return childrenByScan() // a kernel without CONFIG_PROC_CHILDREN
		}
		for _, f := range bytes.Fields(b) {
			if pid, err := strconv.Atoi(string(f)); err == nil {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

// childrenByScan is directChildren by looking at every process there is.
func childrenByScan() []int {
	procs, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	self := []byte(strconv.Itoa(os.Getpid()))
	var pids []int
	for _, p := range procs {
		pid, err := strconv.Atoi(p.Name())
		if err != nil {
			continue
		}
		b, err := os.ReadFile("/proc/" + p.Name() + "/stat")
		if err != nil {
			continue
		}
		// PID (COMM) STATE PPID ...; COMM may contain anything, even ") ".
		f := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
		if len(f) > 1 && bytes.Equal(f[1], self) {
			pids = append(pids, pid)
		}
	}
	return pids
}
