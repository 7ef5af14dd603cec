//go:build linux

package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
)

// A driver is one way to give a guest a network. To add one, write its join (or
// wrap) and enter it in drivers.
type driver struct {
	name string
	what string   // for the legend under the table
	rows []string // the rows it takes part in; nil is all that need no starts
	peer bool     // it is of others and does what slipway does
	// bridged has the load run in a container of the guest; see bridgeMain.
	bridged bool
	// check returns why the driver cannot be measured here, or nil.
	check func(dir string) error
	// join gives the guest its network in a fresh topology. It registers what must
	// be undone with guest.undo before it can fail.
	join func(ctx context.Context, t *topology, g *guest) error
	// publish has the guest's ports published on host; nil where the driver has none
	// of the rows of published ports.
	publish *publisher
	// start is the command of the start row, which must run true(1) in a fresh
	// guest; nil when somebody else has to make the namespace first.
	start func(dir string) *exec.Cmd
}

// guest is where load runs: what a driver's join fills in.
type guest struct {
	source  netip.Addr // the only address that world may see
	source6 netip.Addr // in the rows with IPv6
	viaHost bool       // packets must show on the veth between host and world
	bridged bool       // the load runs in a container of the guest
	path    path       // of slipway's; "" under other drivers
	// run returns the command, not yet started, that runs args in the guest when
	// it is started in network namespace ns.
	run  func(args []string) *exec.Cmd
	ns   string
	pid  int // the driver's daemon; 0 when it is the process of run, or there is none
	undo []func()
}

// path is the way that TCP must take through slipway.
type path string

const (
	pathAny      path = "auto" // whatever slipway chooses
	pathKernel   path = "kernel"
	pathNetstack path = "netstack"
)

// leave undoes join.
func (g *guest) leave() {
	for i := len(g.undo) - 1; i >= 0; i-- {
		g.undo[i]()
	}
}

// drivers returns all drivers in the order of the table.
func drivers() []driver {
	bulkOnly, startOnly := []string{"bulk-up", "bulk-down"}, []string{"start"}
	autoRows := []string{"start", "idle"}
	sw := needBinary("slipway")
	return []driver{
		{name: "native", what: "guest and world joined by one veth, nothing between", join: joinNative, publish: publishNative(), start: startNative},
		{name: "native-bridge", what: "the same from a container on a bridge in the guest, with forwarding and MASQUERADE as dockerd sets them up", bridged: true, check: needProgram("nft"), join: joinNative},
		{name: "routed", what: "guest - host - world by two veths, the host's kernel forwards", join: joinRouted},
		{name: "slipway", what: "`slipway run`, as root: the path is its own choice", rows: autoRows, check: sw, join: wrapSlipway(nil, pathAny), start: startSlipway(nil)},
		{name: "slipway-kernel", what: "`slipway run --path kernel`, as root; UDP takes netstack", check: sw, join: wrapSlipway(nil, pathKernel), publish: publishSlipway(pathKernel)},
		{name: "slipway-kernel-bridge", what: "the same from a container, as in native-bridge", bridged: true, check: needBinary("slipway", "nft"), join: wrapSlipway(nil, pathKernel)},
		{name: "slipway-netstack", what: "`slipway run --path netstack`, as root", check: sw, join: wrapSlipway(nil, pathNetstack), publish: publishSlipway(pathNetstack)},
		{name: "slipway-netstack-bridge", what: "the same from a container, as in native-bridge", bridged: true, check: needBinary("slipway", "nft"), join: wrapSlipway(nil, pathNetstack)},
		{name: "slipway-rootless", what: "`slipway run`, as an ordinary user", rows: startOnly, check: needBinary("slipway", "newuidmap"), join: wrapSlipway(user(), pathAny), start: startSlipway(user())},
		{name: "slirp4netns", what: "MTU 1500, no host loopback", peer: true, check: needProgram("slirp4netns"), join: joinSlirp},
		{name: "pasta", what: "MTU 1500", peer: true, check: needProgram("pasta"), join: joinPasta(1500), start: startPasta},
		{name: "pasta-65520", what: "pasta at its own MTU", peer: true, rows: bulkOnly, check: needProgram("pasta"), join: joinPasta(65520)},
		{name: "rootlesskit-gvisor", what: "rootlesskit with its embedded gvisor-tap-vsock, MTU 1500, as an ordinary user", peer: true, check: needBinary("rootlesskit", "newuidmap"), join: wrapRootlesskit("gvisor-tap-vsock"), start: startRootlesskit("gvisor-tap-vsock")},
		{name: "rootlesskit-slirp4netns", what: "rootlesskit with slirp4netns, as an ordinary user", peer: true, rows: startOnly, check: needBinary("rootlesskit", "newuidmap", "slirp4netns"), join: wrapRootlesskit("slirp4netns"), start: startRootlesskit("slirp4netns")},
		{name: "rootlesskit-builtin", what: "rootlesskit's port driver of that name beside slirp4netns, as an ordinary user", peer: true, rows: publishedNames(), check: needBinary("rootlesskit", "newuidmap", "slirp4netns"), publish: publishRootlesskit()},
	}
}

// driverNames returns the names of all drivers.
func driverNames() []string {
	var out []string
	for _, d := range drivers() {
		out = append(out, d.name)
	}
	return out
}

// needProgram is a check for installed programs.
func needProgram(programs ...string) func(string) error {
	return func(string) error { return need(programs...) }
}

// needBinary is a check for a binary that the harness provides, and programs.
func needBinary(name string, programs ...string) func(string) error {
	return func(dir string) error {
		if err := provided(dir, name); err != nil {
			return err
		}
		return need(programs...)
	}
}

// user returns the credential of the ordinary user.
func user() *syscall.Credential { return &syscall.Credential{Uid: benchUID, Gid: benchUID} }

// plain runs args as they are.
func plain(args []string) *exec.Cmd { return exec.Command(args[0], args[1:]...) }

// as makes cmd a process of the ordinary user, or leaves it ours when cred is nil.
func as(cred *syscall.Credential, dir string, cmd *exec.Cmd) *exec.Cmd {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Credential: cred}
	if cred != nil {
		home := userDir(dir)
		cmd.Dir = home
		cmd.Env = append(os.Environ(), "HOME="+home, "USER="+benchUser, "LOGNAME="+benchUser, "XDG_RUNTIME_DIR="+filepath.Join(home, "run"), "TMPDIR="+home)
	}
	return cmd
}

// daemon starts cmd in the host namespace and ends it in undo.
func (g *guest) daemon(dir string, cmd *exec.Cmd) error {
	as(nil, dir, cmd)
	var errs strings.Builder
	cmd.Stderr = &errs
	if err := startIn(nsHost, cmd); err != nil {
		return fmt.Errorf("start %s: %w", cmd.Path, err)
	}
	g.pid = cmd.Process.Pid
	g.undo = append(g.undo, func() { endProcess(cmd) })
	return nil
}

func joinNative(_ context.Context, t *topology, g *guest) error {
	g.source, g.source6, g.run, g.ns = guestAddr, guestAddr6, plain, nsGuest
	return firstError(t.addGuest, func() error {
		return ipBatch(nsWorld, "link add guest0 mtu 1500 type veth peer name eth0 mtu 1500 netns guest",
			"addr add 203.0.113.1/24 dev guest0", "link set guest0 up")
	}, addressGuest,
		func() error { return t.ipBatch6(nsWorld, "addr add 2001:db8:113::1/64 dev guest0 nodad") },
		func() error {
			return t.ipBatch6(nsGuest, "addr add 2001:db8:113::3/64 dev eth0 nodad", "route add default via 2001:db8:113::1")
		})
}

func joinRouted(_ context.Context, t *topology, g *guest) error {
	g.source, g.run, g.ns, g.viaHost = guestAddr, plain, nsGuest, true
	return firstError(t.addGuest, func() error {
		return ipBatch(nsHost, "link add guest0 mtu 1500 type veth peer name eth0 mtu 1500 netns guest",
			"addr add 203.0.113.1/24 dev guest0", "link set guest0 up")
	}, addressGuest,
		func() error { return setSysctl(nsHost, "net/ipv4/ip_forward", "1") },
		func() error { return ipBatch(nsWorld, "route add 203.0.113.0/24 via 198.51.100.1") })
}

// addressGuest configures the guest's end of a veth.
func addressGuest() error {
	return ipBatch(nsGuest, "addr add 203.0.113.3/24 dev eth0", "link set eth0 up", "route add default via 203.0.113.1")
}

func startNative(string) *exec.Cmd { return exec.Command("unshare", "--net", "--mount", "true") }

// wrapSlipway runs the load as the command of `slipway run`.
func wrapSlipway(cred *syscall.Credential, way path) func(context.Context, *topology, *guest) error {
	return func(_ context.Context, t *topology, g *guest) error {
		g.source, g.source6, g.ns, g.viaHost, g.path = hostAddr, hostAddr6, nsHost, true, way
		g.run = func(args []string) *exec.Cmd {
			return as(cred, t.dir, exec.Command(filepath.Join(t.dir, "slipway"), append([]string{"run", "--path", string(way), "--"}, args...)...))
		}
		return nil
	}
}

func startSlipway(cred *syscall.Credential) func(string) *exec.Cmd {
	return func(dir string) *exec.Cmd {
		return as(cred, dir, exec.Command(filepath.Join(dir, "slipway"), "run", "--", "true"))
	}
}

// joinSlirp starts slirp4netns and waits for its ready descriptor.
func joinSlirp(_ context.Context, t *topology, g *guest) error {
	g.source, g.run, g.ns, g.viaHost = hostAddr, plain, nsGuest, true
	if err := t.addGuest(); err != nil {
		return err
	}
	ready, theirs, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ready.Close()
	cmd := exec.Command("slirp4netns", "--configure", "--mtu=1500", "--disable-host-loopback", "--ready-fd=3", "--netns-type=path", "/run/netns/"+nsGuest, "tap0")
	cmd.ExtraFiles = []*os.File{theirs} // becomes descriptor 3
	err = g.daemon(t.dir, cmd)
	theirs.Close()
	if err != nil {
		return err
	}
	if _, err := ready.Read(make([]byte, 1)); err != nil {
		return fmt.Errorf("slirp4netns ended before it was ready: %v", cmd.Stderr)
	}
	return nil
}

// joinPasta starts pasta for the guest's namespace. It needs a path under
// /run/netns, --runas 0 lest it become nobody, and --no-map-gw so that it leaves
// the gateway's address alone. The load tool waits until it is ready.
func joinPasta(mtu int) func(context.Context, *topology, *guest) error {
	return func(_ context.Context, t *topology, g *guest) error {
		g.source, g.source6, g.run, g.ns, g.viaHost = hostAddr, hostAddr6, plain, nsGuest, true
		if err := t.addGuest(); err != nil {
			return err
		}
		return g.daemon(t.dir, exec.Command("pasta", "--foreground", "--quiet", "--config-net", "--runas", "0", "--no-map-gw", "--mtu", fmt.Sprint(mtu),
			"-t", "none", "-u", "none", "-T", "none", "-U", "none", "--netns", "/run/netns/"+nsGuest))
	}
}

func startPasta(dir string) *exec.Cmd {
	return as(user(), dir, exec.Command("pasta", "--quiet", "--config-net", "--no-map-gw", "-t", "none", "-u", "none", "-T", "none", "-U", "none", "--", "true"))
}

// wrapRootlesskit runs the load as the command of rootlesskit.
func wrapRootlesskit(network string) func(context.Context, *topology, *guest) error {
	return func(_ context.Context, t *topology, g *guest) error {
		g.source, g.ns, g.viaHost = hostAddr, nsHost, true
		g.run = func(args []string) *exec.Cmd { return rootlesskit(t.dir, network, args) }
		return nil
	}
}

func startRootlesskit(network string) func(string) *exec.Cmd {
	return func(dir string) *exec.Cmd { return rootlesskit(dir, network, []string{"true"}) }
}

// rootlesskit returns the command that runs args behind a network driver, with
// the flags that its own documentation uses.
func rootlesskit(dir, network string, args []string) *exec.Cmd {
	return as(user(), dir, exec.Command(filepath.Join(dir, "rootlesskit"),
		append([]string{"--net=" + network, "--mtu=1500", "--disable-host-loopback", "--copy-up=/etc", "--"}, args...)...))
}
