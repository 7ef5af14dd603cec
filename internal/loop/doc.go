// Package loop waits for many descriptors on one thread and calls their handlers
// there, one at a time: what takes a few microseconds a call and must not pay for a
// goroutine's wake-up. Handlers need no locks among themselves, and must not block.
//
// New, Start, Do to add the first descriptors, Close.
package loop
