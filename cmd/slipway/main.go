// Command slipway runs container engines in a network of their own, whose traffic
// leaves through ordinary sockets of the host.
//
// This folder is the command line only: flags, output, exit statuses. What happens is
// in internal/daemon.
package main

import (
	"context"
	"os"
)

// version is set by the linker (Makefile).
var version = "unknown"

func main() {
	runAgent() // before anything that costs time; does not return in an agent
	os.Exit(execute(context.Background(), os.Args[1:]))
}
