package nsagent

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Talking to nftables. The package google/nftables knows the expressions; the tables we
// send ourselves, because it can neither make one that is owned by a socket, nor tell
// which of several messages the kernel refused, nor hand out the socket.
//
// Everything goes in batches, which the kernel takes or leaves as a whole. Only the last
// message of one asks for an answer: an error is answered without being asked for.
const (
	// nftTableOwner is NFT_TABLE_F_OWNER of linux/netfilter/nf_tables.h, Linux 5.12.
	nftTableOwner = 2
	// nftTimeout bounds the wait for answers, which the kernel sends before sendmsg
	// returns, so it passes only when the kernel acts against the protocol.
	nftTimeout = 5 * time.Second
	// nftAnswer is more than an answer has, in bytes: it does not repeat the question
	// (NETLINK_CAP_ACK).
	nftAnswer = 16 << 10
	// nfgenmsgLen is the length of struct nfgenmsg, the header after netlink's.
	nfgenmsgLen = 4
)

// nftChain is a base chain with its rules.
type nftChain struct {
	name     string
	typ      nftables.ChainType
	hook     *nftables.ChainHook
	priority int32
	rules    [][]expr.Any
	comment  string // of each rule, as nft shows it; none if empty
}

// nftMessage is one message of a batch.
type nftMessage struct {
	typ    uint16 // NFT_MSG_*
	flags  uint16 // besides NLM_F_REQUEST
	family nftables.TableFamily
	what   string // for errors
	attrs  []byte
}

// nftError says which message the kernel refused, and which part of it.
type nftError struct {
	index int // of the message in its batch; -1 for the batch as a whole
	what  string
	errno unix.Errno
}

func (e *nftError) Error() string { return fmt.Sprintf("%s: %v", e.what, e.errno) }
func (e *nftError) Unwrap() error { return e.errno }

// nftSocket is a netlink socket of nftables. It serves one goroutine at a time.
type nftSocket struct {
	fd  int
	seq uint32 // of the last message
}

// openNFT opens a socket in the namespace of the calling thread.
func openNFT() (*nftSocket, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, err
	}
	limit := unix.NsecToTimeval(nftTimeout.Nanoseconds())
	if err := errors.Join(
		unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit),
	); err != nil {
		unix.Close(fd)
		return nil, err
	}
	// Without them (before Linux 4.12) an error says less.
	unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1)
	unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_EXT_ACK, 1)
	return &nftSocket{fd: fd}, nil
}

func (s *nftSocket) close() { unix.Close(s.fd) }

// port returns the number by which the kernel tells whose doing a change was.
func (s *nftSocket) port() (uint32, error) {
	sa, err := unix.Getsockname(s.fd)
	if err != nil {
		return 0, err
	}
	n, ok := sa.(*unix.SockaddrNetlink)
	if !ok {
		return 0, unix.EAFNOSUPPORT
	}
	return n.Pid, nil
}

// header appends the headers of netlink and nfnetlink for a body of n bytes.
func (s *nftSocket) header(b []byte, n int, typ, flags uint16, family byte, resource uint16) []byte {
	s.seq++
	b = binary.NativeEndian.AppendUint32(b, uint32(unix.SizeofNlMsghdr+nfgenmsgLen+n))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = binary.NativeEndian.AppendUint16(b, unix.NLM_F_REQUEST|flags)
	b = binary.NativeEndian.AppendUint32(b, s.seq)
	b = binary.NativeEndian.AppendUint32(b, 0)
	b = append(b, family, unix.NFNETLINK_V0)
	return binary.BigEndian.AppendUint16(b, resource)
}

// send has the kernel apply the messages, all of them or none. An error is an *nftError
// if the kernel said no.
func (s *nftSocket) send(messages []nftMessage) error {
	begin := s.seq + 1
	b := s.header(nil, 0, unix.NFNL_MSG_BATCH_BEGIN, 0, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES)
	starts := make([]int, len(messages))
	for i, m := range messages {
		flags := m.flags
		if i == len(messages)-1 {
			flags |= unix.NLM_F_ACK
		}
		starts[i] = len(b)
		b = s.header(b, len(m.attrs), unix.NFNL_SUBSYS_NFTABLES<<8|m.typ, flags, byte(m.family), 0)
		b = append(b, m.attrs...)
	}
	last := s.seq
	b = s.header(b, 0, unix.NFNL_MSG_BATCH_END, 0, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES)
	if err := unix.Sendto(s.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	var first error
	for {
		answers, err := s.receive()
		if err != nil {
			return err
		}
		for _, a := range answers {
			if a.Header.Type != unix.NLMSG_ERROR || a.Header.Seq < begin || len(a.Data) < 4 {
				continue // left over from a batch that failed
			}
			errno := unix.Errno(-int32(binary.NativeEndian.Uint32(a.Data)))
			if errno != 0 && first == nil { // later ones follow from it
				e := &nftError{index: -1, what: "nftables", errno: errno}
				if i := int(a.Header.Seq - begin - 1); a.Header.Seq > begin && i < len(messages) {
					e.index, e.what = i, messages[i].what
					if name := refusedExpr(b[starts[i]:], a); name != "" {
						e.what = name
					}
				}
				first = e
			}
			if a.Header.Seq == last || a.Header.Seq == begin {
				return first
			}
		}
	}
}

// receive reads one datagram.
func (s *nftSocket) receive() ([]syscall.NetlinkMessage, error) {
	b := make([]byte, nftAnswer)
	for {
		n, _, err := unix.Recvfrom(s.fd, b, 0)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return nil, err
		default:
			return syscall.ParseNetlinkMessage(b[:n])
		}
	}
}

// refusedExpr returns the name of the expression of a rule that the kernel points at
// with its answer, or nothing: "tproxy" where the kernel has none.
func refusedExpr(request []byte, answer syscall.NetlinkMessage) string {
	const (
		capped, tlvs = 0x100, 0x200 // NLM_F_CAPPED, NLM_F_ACK_TLVS
		attrOffset   = 2            // NLMSGERR_ATTR_OFFS
		head         = 4            // of an attribute
	)
	const want = capped | tlvs
	data := answer.Data
	if answer.Header.Flags&want != want || len(data) < 4+unix.SizeofNlMsghdr {
		return ""
	}
	attrs, err := netlink.UnmarshalAttributes(data[4+unix.SizeofNlMsghdr:])
	if err != nil {
		return ""
	}
	for _, a := range attrs {
		if a.Type != attrOffset || len(a.Data) != 4 {
			continue
		}
		at := uint64(binary.NativeEndian.Uint32(a.Data))
		if at+head > uint64(len(request)) {
			return ""
		}
		element := request[at:]
		size := int(binary.NativeEndian.Uint16(element))
		if size < head || size > len(element) || binary.NativeEndian.Uint16(element[2:])&^unix.NLA_F_NESTED != unix.NFTA_LIST_ELEM {
			return ""
		}
		inner, err := netlink.UnmarshalAttributes(element[head:size])
		if err == nil && len(inner) > 0 && inner[0].Type == unix.NFTA_EXPR_NAME {
			return unix.ByteSliceToString(inner[0].Data)
		}
	}
	return ""
}

// hasTable tells whether there is a table of that name, be it ours or not.
func (s *nftSocket) hasTable(family nftables.TableFamily, name string) (bool, error) {
	attrs, err := netlink.MarshalAttributes([]netlink.Attribute{nftString(unix.NFTA_TABLE_NAME, name)})
	if err != nil {
		return false, err
	}
	b := s.header(nil, len(attrs), unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETTABLE, 0, byte(family), 0)
	if err := unix.Sendto(s.fd, append(b, attrs...), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return false, err
	}
	for {
		answers, err := s.receive()
		if err != nil {
			return false, err
		}
		for _, a := range answers {
			switch {
			case a.Header.Seq != s.seq:
			case a.Header.Type != unix.NLMSG_ERROR:
				return true, nil
			case len(a.Data) >= 4:
				errno := unix.Errno(-int32(binary.NativeEndian.Uint32(a.Data)))
				if errno == unix.ENOENT {
					return false, nil
				}
				return false, errno
			}
		}
	}
}

// allRulesHave tells whether a table has rules, and every one of them the comment.
func (s *nftSocket) allRulesHave(family nftables.TableFamily, table, comment string) (bool, error) {
	attrs, err := netlink.MarshalAttributes([]netlink.Attribute{nftString(unix.NFTA_RULE_TABLE, table)})
	if err != nil {
		return false, err
	}
	b := s.header(nil, len(attrs), unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETRULE, unix.NLM_F_DUMP, byte(family), 0)
	if err := unix.Sendto(s.fd, append(b, attrs...), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return false, err
	}
	rules, without := 0, 0
	for {
		answers, err := s.receive()
		if err != nil {
			return false, err
		}
		for _, a := range answers {
			switch {
			case a.Header.Seq != s.seq:
			case a.Header.Type == unix.NLMSG_DONE:
				return rules > 0 && without == 0, nil
			case a.Header.Type == unix.NLMSG_ERROR || len(a.Data) < nfgenmsgLen:
				return false, unix.EIO
			default:
				of, with := ruleComment(a.Data[nfgenmsgLen:])
				if of == table { // old kernels ignore which one was asked for
					rules++
					if !bytes.Equal(with, nftComment(comment)) {
						without++
					}
				}
			}
		}
	}
}

// ruleComment returns a rule's table, and its comment as nftComment makes it.
func ruleComment(rule []byte) (table string, comment []byte) {
	attrs, err := netlink.UnmarshalAttributes(rule)
	if err != nil {
		return "", nil
	}
	for _, a := range attrs {
		switch a.Type {
		case unix.NFTA_RULE_TABLE:
			table = unix.ByteSliceToString(a.Data)
		case unix.NFTA_RULE_USERDATA:
			comment = a.Data
		}
	}
	return table, comment
}

// newTable makes a table that must not be there; owned by the socket if so asked.
func newTable(family nftables.TableFamily, name string, owned bool) (nftMessage, error) {
	list := []netlink.Attribute{nftString(unix.NFTA_TABLE_NAME, name)}
	if owned {
		list = append(list, nftUint32(unix.NFTA_TABLE_FLAGS, nftTableOwner))
	}
	attrs, err := netlink.MarshalAttributes(list)
	return nftMessage{unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE | unix.NLM_F_EXCL, family, "table", attrs}, err
}

// delTable removes a table that must be there.
func delTable(family nftables.TableFamily, name string) (nftMessage, error) {
	attrs, err := netlink.MarshalAttributes([]netlink.Attribute{nftString(unix.NFTA_TABLE_NAME, name)})
	return nftMessage{unix.NFT_MSG_DELTABLE, 0, family, "table", attrs}, err
}

// messages makes the chain c and its rules in a table.
func (c *nftChain) messages(family nftables.TableFamily, table string) ([]nftMessage, error) {
	hook, err := netlink.MarshalAttributes([]netlink.Attribute{
		nftUint32(unix.NFTA_HOOK_HOOKNUM, uint32(*c.hook)),
		nftUint32(unix.NFTA_HOOK_PRIORITY, uint32(c.priority)),
	})
	if err != nil {
		return nil, err
	}
	attrs, err := netlink.MarshalAttributes([]netlink.Attribute{
		nftString(unix.NFTA_CHAIN_TABLE, table),
		nftString(unix.NFTA_CHAIN_NAME, c.name),
		{Type: unix.NLA_F_NESTED | unix.NFTA_CHAIN_HOOK, Data: hook},
		nftString(unix.NFTA_CHAIN_TYPE, string(c.typ)),
	})
	if err != nil {
		return nil, err
	}
	what := fmt.Sprintf("%s chain %s", c.typ, c.name)
	list := []nftMessage{{unix.NFT_MSG_NEWCHAIN, unix.NLM_F_CREATE, family, what, attrs}}
	for _, rule := range c.rules {
		attrs, err := c.rule(family, table, rule)
		if err != nil {
			return nil, err
		}
		list = append(list, nftMessage{unix.NFT_MSG_NEWRULE, unix.NLM_F_CREATE | unix.NLM_F_APPEND,
			family, "rule of chain " + c.name, attrs})
	}
	return list, nil
}

// rule returns the attributes of one rule.
func (c *nftChain) rule(family nftables.TableFamily, table string, exprs []expr.Any) ([]byte, error) {
	var elements []netlink.Attribute
	for _, e := range exprs {
		b, err := expr.Marshal(byte(family), e)
		if err != nil {
			return nil, err
		}
		elements = append(elements, netlink.Attribute{Type: unix.NLA_F_NESTED | unix.NFTA_LIST_ELEM, Data: b})
	}
	b, err := netlink.MarshalAttributes(elements)
	if err != nil {
		return nil, err
	}
	attrs := []netlink.Attribute{
		nftString(unix.NFTA_RULE_TABLE, table),
		nftString(unix.NFTA_RULE_CHAIN, c.name),
		{Type: unix.NLA_F_NESTED | unix.NFTA_RULE_EXPRESSIONS, Data: b},
	}
	if c.comment != "" {
		attrs = append(attrs, netlink.Attribute{Type: unix.NFTA_RULE_USERDATA, Data: nftComment(c.comment)})
	}
	return netlink.MarshalAttributes(attrs)
}

// nftComment is a comment as nft keeps it with a rule: NFTNL_UDATA_RULE_COMMENT, length,
// and the text.
func nftComment(s string) []byte {
	return append([]byte{0, byte(len(s) + 1)}, s+"\x00"...)
}

func nftString(typ uint16, s string) netlink.Attribute {
	return netlink.Attribute{Type: typ, Data: append([]byte(s), 0)}
}

func nftUint32(typ uint16, n uint32) netlink.Attribute {
	return netlink.Attribute{Type: typ, Data: binary.BigEndian.AppendUint32(nil, n)}
}
