//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// rootlesskitModule is the peer that embeds gvisor-tap-vsock; it is built outside
// our own go.mod.
const (
	rootlesskitModule  = "github.com/rootless-containers/rootlesskit/v3/cmd/rootlesskit"
	rootlesskitVersion = "v3.1.0"
)

// packages maps the programs that the harness runs to their Debian packages.
var packages = map[string]string{
	"ip":          "iproute2",
	"iperf3":      "iperf3",
	"slirp4netns": "slirp4netns",
	"pasta":       "passt",
	"newuidmap":   "uidmap",
	"nft":         "nftables",
}

// installPackages installs what is missing where apt-get exists. What it cannot
// get is reported by the driver or row that needs it.
func installPackages(ctx context.Context) {
	var missing []string
	for program, pkg := range packages {
		if _, err := exec.LookPath(program); err != nil {
			missing = append(missing, pkg)
		}
	}
	if len(missing) == 0 {
		return
	}
	slices.Sort(missing)
	if _, err := exec.LookPath("apt-get"); err != nil {
		fmt.Fprintln(os.Stderr, "bench: missing packages:", missing)
		return
	}
	fmt.Fprintln(os.Stderr, "bench: installing", missing)
	args := append([]string{"install", "-y", "--no-install-recommends"}, missing...)
	for _, a := range [][]string{args, {"update"}, args} { // the lists may be missing or old
		cmd := exec.CommandContext(ctx, "apt-get", a...)
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
		out, err := cmd.CombinedOutput()
		if err == nil && a[0] == "install" {
			return
		}
		if err != nil {
			fmt.Fprintf(os.Stderr, "bench: apt-get %s: %v: %s\n", a[0], err, lastLine(out))
		}
	}
}

// need reports a program that is not installed as the reason for not measuring.
func need(programs ...string) error {
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			return fmt.Errorf("%s is not installed (package %s)", p, packages[p])
		}
	}
	return nil
}

// prepareBinaries puts what is to be measured into dir: bench (this binary),
// slipway and rootlesskit. The latter two may fail; then the file why.NAME says
// why, and the driver repeats it.
func prepareBinaries(ctx context.Context, opt options, dir string) error {
	self, err := selfPath()
	if err != nil {
		return err
	}
	if err := copyFile(self, filepath.Join(dir, "bench")); err != nil {
		return err
	}
	uses := func(family string) bool {
		return slices.ContainsFunc(opt.drivers, func(d string) bool { return strings.HasPrefix(d, family) })
	}
	if uses("slipway") {
		note(dir, "slipway", provideSlipway(ctx, opt.slipway, filepath.Join(dir, "slipway")))
	}
	if uses("rootlesskit") {
		note(dir, "rootlesskit", provideRootlesskit(ctx, filepath.Join(dir, "rootlesskit")))
	}
	return nil
}

// note keeps the reason why a binary is not there.
func note(dir, name string, err error) {
	if err == nil {
		return
	}
	fmt.Fprintf(os.Stderr, "bench: %s: %v\n", name, err)
	_ = os.WriteFile(filepath.Join(dir, "why."+name), []byte(err.Error()), 0o644)
}

// provided returns nil when the binary is in dir, else the reason kept by note.
func provided(dir, name string) error {
	if _, err := os.Stat(filepath.Join(dir, name)); err == nil {
		return nil
	}
	why, err := os.ReadFile(filepath.Join(dir, "why."+name))
	return cmpErr(err, errors.New(string(why)))
}

// provideSlipway copies the given binary, or builds the one of this tree.
func provideSlipway(ctx context.Context, binary, to string) error {
	if binary != "" {
		return copyFile(binary, to)
	}
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", to, "./cmd/slipway") // as make build
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("go build ./cmd/slipway: %w: %s", err, lastLine(out))
	}
	return nil
}

// provideRootlesskit builds the peer once into the user's cache directory.
func provideRootlesskit(ctx context.Context, to string) error {
	cache, err := os.UserCacheDir()
	if err != nil {
		return err
	}
	dir := filepath.Join(cache, "slipway-bench", "rootlesskit-"+rootlesskitVersion)
	built := filepath.Join(dir, "rootlesskit")
	if _, err := os.Stat(built); err != nil {
		fmt.Fprintln(os.Stderr, "bench: building rootlesskit", rootlesskitVersion)
		cmd := exec.CommandContext(ctx, "go", "install", rootlesskitModule+"@"+rootlesskitVersion)
		cmd.Env = append(os.Environ(), "GOBIN="+dir, "GOFLAGS=-mod=mod")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("go install rootlesskit@%s: %w: %s", rootlesskitVersion, err, lastLine(out))
		}
	}
	return copyFile(built, to)
}
