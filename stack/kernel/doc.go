// Package kernel ends a guest's TCP connections in the guest's own kernel: it writes a
// held SYN back to the guest's device, where rules give it to a transparent listener,
// and accepts the connection there. What it accepts it hands on as a socket.
//
// New, then Answer for each SYN; Probe tells whether it works here.
package kernel
