// Package nsagent makes the guest's namespaces and keeps a small process in them,
// the agent, which opens devices there and passes them out to the daemon.
//
// The daemon cannot enter a namespace it made without being root (setns(2) into a
// user namespace refuses a process with threads, and Go always has some). So Start
// runs our own binary once more as the first process of the new namespaces, with a
// socketpair as file descriptor 3. Root, rootless and attached guests use the same
// agent and the same few requests:
//
//	agent, err := nsagent.Start(ctx, spec, log) // namespaces, mounts, TUN, routes
//	tun := agent.TUN()                          // the caller owns it from now on
//	sockets := agent.Kernel()                   // likewise; of the kernel path, if asked for
//	p, err := agent.Exec(ctx, command)          // as often as wanted
//	status, err := p.Wait()
//	agent.Close(ctx)                            // TERM, StopTimeout, KILL; nothing is left
//
// A program that uses Start calls IsAgent first thing in main and, when it answers
// true, Main, which does not return.
//
// Lifetime: everything that was started inside ends with the agent, and the agent
// ends with the daemon, because it reads the end of file on the socketpair, whatever
// ended the daemon. Should the agent be killed, its orphans are reparented to the
// daemon (a child subreaper, see prctl(2)), which kills them. The TUN belongs to
// whoever holds the file: the agent keeps no copy, nor of the listeners, nor of the
// socket that owns the tables of nftables.
//
// The package is made of Linux namespaces; on other systems it is empty.
package nsagent
