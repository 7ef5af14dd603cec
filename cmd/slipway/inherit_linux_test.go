package main

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// script runs a shell script that starts slipway as "$0" in a state of its own making.
func script(t *testing.T, text string) result {
	t.Helper()
	var out, errOut bytes.Buffer
	cmd := command(t, "-c", text, bin)
	cmd.Path, cmd.Args[0] = "/bin/sh", "sh"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // a process group of its own, no terminal
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return result{out.String(), errOut.String(), code(cmd)}
}

// What whoever starts slipway has set, the command finds as without slipway.
func TestCommandInherits(t *testing.T) {
	needEngines(t)
	for _, tt := range []struct{ name, before, command, want string }{ // no want: as without slipway
		{"no files of ours", "exec 7</dev/null", "ls /proc/self/fd | grep -v -e 0 -e 1 -e 2 | wc -l", "1\n"}, // ls opens one
		{"no blocked signals", "", "grep SigBlk /proc/self/status", "SigBlk:\t0000000000000000\n"},
		{"ignored signals", "", "grep SigIgn /proc/self/status", ""},
		{"nohup", "trap '' HUP", "grep SigIgn /proc/self/status", ""},
		{"umask", "umask 027", "umask", "0027\n"},
		{"limit of files", "ulimit -Sn 333", "ulimit -Sn", "333\n"},
		{"closed files", "exec <&-", "readlink /proc/self/fd/0", "/dev/null\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.want == "" { // the test's own surroundings decide
				tt.want = script(t, tt.before+"\n"+tt.command).stdout
			}
			r := script(t, tt.before+"\n"+`exec "$0" run -- sh -c '`+tt.command+"'")
			if r.code != 0 || r.stdout != tt.want {
				t.Errorf("status %d, stdout %q, want %q; stderr %s", r.code, r.stdout, tt.want, r.stderr)
			}
		})
	}
}

// HUP under nohup ends neither slipway nor the command.
func TestNohup(t *testing.T) {
	needEngines(t)
	r := script(t, `trap '' HUP; "$0" run -- sh -c 'kill -HUP $(ps -o pgid= $$ | sed "s/^ */-/"); sleep 0.1; exit 9'`)
	if r.code != 9 {
		t.Errorf("status %d, stderr %s", r.code, r.stderr)
	}
	nothingLeft(t)

	e := start(t, "hup", "run", "--name", "hup", "--", "sleep", "60")
	r = script(t, `trap '' HUP; "$0" exec hup -- sh -c 'sleep 0.3; exit 8' & sleep 0.2; kill -HUP $!; wait $!`)
	if r.code != 8 {
		t.Errorf("exec: status %d, stderr %s", r.code, r.stderr)
	}
	e.Process.Signal(unix.SIGTERM)
	e.end(t)
}

// Users of the guest read its names whatever umask slipway was started with.
func TestNamesWithUmask(t *testing.T) {
	needEngines(t)
	r := script(t, `umask 077; "$0" run -- stat -L -c %a /etc/resolv.conf /etc/hosts`)
	if r.code != 0 || strings.Contains(r.stdout, "600") {
		t.Errorf("status %d, modes %q, stderr %s", r.code, r.stdout, r.stderr)
	}
}

// A log that nobody reads any more ends nobody.
func TestLogNobodyReads(t *testing.T) {
	needEngines(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	file := filepath.Join(t.TempDir(), "c.toml")
	os.WriteFile(file, []byte("[engine.mute]\ncommand = [\"sleep\", \"60\"]\n"), 0o600)
	cmd := command(t, "up", "--log-level", "debug", "--config", file)
	cmd.Stderr = w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the engine answers", func() bool { return slipway(t, "status", "mute").code == 0 })
	r.Close()
	for range 3 {
		cmd.Process.Signal(unix.SIGHUP) // each logs a line
		if r := slipway(t, "status", "mute"); r.code != 0 {
			t.Fatal(r.stderr)
		}
	}
	cmd.Process.Signal(unix.SIGTERM)
	cmd.Wait()
	if got := code(cmd); got != 128+int(unix.SIGTERM) {
		t.Errorf("status %d", got)
	}
	nothingLeft(t)
}

func TestSetEnv(t *testing.T) {
	got := setEnv([]string{"A=1", "B=2", "A=3", "AB=4"}, map[string]string{"A": "5", "C": "6"})
	if want := []string{"B=2", "AB=4", "A=5", "C=6"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}
