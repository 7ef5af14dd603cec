// Package kernel ends a guest's TCP connections in the guest's own kernel: it writes a
// held SYN back to the guest's device, where rules give it to a transparent listener,
// and accepts the connection there. What it accepts it hands on as a socket.
// The other way round, it puts a socket in the place of a client whose handshake came in
// by the device.
//
// New, then Answer for each SYN, and Enter for each client.
package kernel
