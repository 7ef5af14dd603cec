//go:build !unix

package main

import (
	"context"
	"os"

	"github.com/slipway-net/slipway/internal/api"
)

var forwarded = []os.Signal{os.Interrupt}

func execOn(ctx context.Context, c *api.Client, r api.ExecRequest, signals <-chan os.Signal) (int, error) {
	return c.Exec(ctx, r, [3]*os.File{os.Stdin, os.Stdout, os.Stderr}, signals)
}
