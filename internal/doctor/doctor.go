// Package doctor tells whether this machine can run slipway, what is missing, and the
// command that mends it.
//
// Check looks at files and settings and makes a short-lived child in namespaces of its
// own that tries what an engine needs; nothing on the machine is changed. The child is
// our own binary: a program that calls Check first asks IsTrial in main and, when it
// answers true, calls Trial, which does not return.
package doctor

import (
	"context"
	"fmt"
	"slices"
	"strings"
)

// Status is how well a requirement is met.
type Status string

// The values of Status.
const (
	OK   Status = "ok"
	Warn Status = "warn" // slipway works, but something in it does not, or is slow
	Fail Status = "fail" // slipway does not start
)

// Finding is what was found about one requirement.
type Finding struct {
	Name   string `json:"name"`   // the requirement in one to three words: "ping sockets"
	Status Status `json:"status"` // never empty
	Detail string `json:"detail"` // one line: what is there, or what is missing and what that means
	Fix    string `json:"fix,omitempty"`
	// Fix is a shell command that mends it as this user, with sudo where it
	// needs that; empty where no single command does.
}

// Options say for which use the machine is examined.
type Options struct {
	// Rootless asks about engines in a user namespace, which is what an
	// ordinary user gets in any case.
	Rootless bool
}

// Check examines the machine. It takes less than a second, 10 s at most, and returns
// at least one Finding, always in the same order. When ctx ends early it is what could
// not be examined that says so.
func Check(ctx context.Context, opt Options) []Finding { return examine(ctx, opt) }

// Failed tells whether slipway cannot start.
func Failed(findings []Finding) bool {
	return slices.ContainsFunc(findings, func(f Finding) bool { return f.Status == Fail })
}

// Format is the Finding in columns, without a last line end; a command that mends it
// has a line of its own.
func Format(f Finding) string {
	line := fmt.Sprintf("%-5s %-20s %s", f.Status, f.Name, f.Detail)
	if f.Fix != "" {
		line += fmt.Sprintf("\n%-26s fix: %s", "", f.Fix)
	}
	return strings.TrimRight(line, " ")
}
