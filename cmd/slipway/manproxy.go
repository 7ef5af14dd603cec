package main

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/slipway-net/slipway/internal/dockerproxy"
)

// What the page of slipway-docker-proxy says besides its flags.
const (
	proxyAbout = `.SH DESCRIPTION
The program that dockerd starts for each port that a container publishes, where
.B \-\-userland\-proxy\-path
names it;
.B slipway up
with
.B kind = \(dqdockerd\(dq
does so. It asks slipway to publish the port on the host, for as long as it runs, and serves clients inside the engine
as dockerd's own proxy does. It is not meant to be started by hand.
`
	proxyEnvironment = `.SH ENVIRONMENT
.TP
.B SLIPWAY_SOCK
The engine's
.IR guest.sock .
Without it nothing is published on the host.
.SH SEE ALSO
.BR slipway\-ports (1),
.BR slipway.toml (5)
`
)

// writeProxyPage writes slipway-docker-proxy(1) into dir.
func writeProxyPage(dir string) error {
	var b strings.Builder
	name := troff(dockerproxy.Name)
	fmt.Fprintf(&b, ".TH %s 1 \"\" \"slipway %s\" \"User Commands\"\n", strings.ToUpper(name), troff(version))
	fmt.Fprintf(&b, ".SH NAME\n%s \\- publishes a container's port, for dockerd\n.SH SYNOPSIS\n.B %s\n[FLAG...]\n", name, name)
	b.WriteString(proxyAbout + ".SH OPTIONS\n")
	dockerproxy.VisitFlags(func(f *flag.Flag) {
		value, what := flag.UnquoteUsage(f)
		fmt.Fprintf(&b, ".TP\n\\fB\\-%s\\fR \\fI%s\\fR\n%s\n", troff(f.Name), troff(value), troff(what))
	})
	b.WriteString(proxyEnvironment)
	if err := os.WriteFile(filepath.Join(dir, dockerproxy.Name+".1"), []byte(b.String()), 0o644); err != nil {
		return fmt.Errorf("write manual page: %w", err)
	}
	return nil
}
