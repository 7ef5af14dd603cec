//go:build !linux

package publish

// helper is for the tests of Linux.
func helper(string) {}
