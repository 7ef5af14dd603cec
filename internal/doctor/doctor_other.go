//go:build !linux

package doctor

import (
	"context"
	"runtime"
)

func examine(context.Context, Options) []Finding {
	return []Finding{{Name: "operating system", Status: Fail, Detail: "engines run on Linux (WSL 2 is one), and this is " + runtime.GOOS}}
}

// IsTrial is false: there are no trials on this system.
func IsTrial() bool { return false }

// Trial does nothing on this system.
func Trial() {}
