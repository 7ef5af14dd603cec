//go:build !linux

package publish

import "math"

// openFiles is the process' limit of descriptors: not asked for here.
func openFiles() int { return math.MaxInt32 }

// unprivilegedPorts is the first port that everybody may listen on.
func unprivilegedPorts() int { return 1024 }
