// Package publish keeps the book of an engine's published ports: what listens on the
// host for the guest, who asked for it, and what may be asked for.
//
// New makes a Book; Add and Remove, or Reconcile for one owner's whole list, change
// it; Close ends it. The Book owns the listening sockets; a Carrier, given by the
// one who makes the Book, moves the bytes of the clients that arrive on them. Owners
// (the command line, an engine's API, one connection of docker-proxy's) do not see
// each other's ports: asking again for what one has is no error, asking for what
// another has is one, unless both are one person.
package publish

import (
	"cmp"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/slipway-net/slipway/internal/flow"
)

// Config is what a Book is made of.
type Config struct {
	// Guest4 and Guest6 are the engine's own addresses, which clients reach where a
	// PortSpec names no guest address. A zero Addr means there is none.
	Guest4, Guest6 netip.Addr

	Carrier Carrier // carries the clients; never nil

	Bind    string                 // one of the Bind constants; "" is BindAsAsked
	Allowed func(port uint16) bool // which host ports may be asked for; nil allows all. Pure.
	Source  flow.Source            // for specs without one; "" is flow.SourcePreserve

	// Inside returns an error that says why not, perhaps with a method Hint, if the guest neither
	// has nor routes an address of its networks. It is asked for the Guest and Behind of a PortSpec,
	// unless that is the engine's own or a loopback address; it may wait. nil admits all.
	Inside func(netip.Addr) error

	// Yields is an owner whose ports give way to everybody else's: auto publish may
	// see what dockerd listens on before docker-proxy asks for the port. "" is nobody.
	Yields string

	// Together are owners who are one person: what one of them has, the others may ask
	// for, too. It is withdrawn when all who asked have given it up, or by Remove.
	Together []string

	// Max is how many ports there may be; 0 stands for 16384. Whatever it is, the
	// sockets are never more than a quarter of the process' limit of descriptors.
	Max int

	// Inherited are listening TCP and bound UDP sockets that a service manager passed
	// on. One is used instead of a socket of our own where its address and port are
	// what is to be listened on. The Book closes them.
	Inherited []*os.File

	Log *slog.Logger // nil discards
}

// The values of Config.Bind.
const (
	BindAsAsked         = "as-asked"         // where the PortSpec says
	BindLoopbackDefault = "loopback-default" // loopback, unless the PortSpec names one address; 0.0.0.0 and [::] are not one
	BindLoopbackOnly    = "loopback-only"    // as BindLoopbackDefault, and refuse all other addresses
)

// Carrier carries the clients that arrive on a socket of a published port into the
// guest, until the returned Closer is closed. The socket stays the Book's to close,
// which it does after the Closer; the Closer must not leave anybody reading it. ServeUDP may
// close c before, if it receives by a descriptor of its own.
// The methods do not wait for a client. They are called without locks, also
// for several ports at a time.
type Carrier interface {
	ServeTCP(ln *net.TCPListener, p *Port) (io.Closer, error)
	ServeUDP(c *net.UDPConn, p *Port) (io.Closer, error)
}

// Port is one published port. All but its Owner and Stats is constant.
type Port struct {
	ID uint64 // never used twice by one Book

	// Spec is what was asked for, with what was left open filled in: the port the
	// host chose, the engine's own address (the IPv4 one where clients of both
	// families come), the guest's port, the source.
	Spec flow.PortSpec

	Since time.Time

	// Listens has the addresses that are listened on: one, or two for both families. It
	// is empty for the wildcard address of a family that the host does not do.
	Listens []netip.AddrPort

	// Wildcard tells that no specific host address was asked for, also where the
	// policy made it loopback: the engine inside knows the port as one on all of its addresses.
	Wildcard bool

	Stats Stats // the Carrier counts

	owner          atomic.Value  // of string
	asked          flow.PortSpec // as it came, normalized
	guest4, guest6 netip.Addr
	dual           bool // one inherited socket for both families
}

// Stats count what happened on a Port. They are safe for concurrent use.
type Stats struct {
	Clients atomic.Uint64 // connections and UDP mappings so far
	Refused atomic.Uint64 // clients that the guest refused, or did not answer
	Gateway atomic.Uint64 // clients seen as the gateway although their own address was asked for
	Dropped atomic.Uint64 // datagrams that were lost here
	Errors  atomic.Uint64 // failed accepts and reads
}

// Owner is who asked for it, and of several who still want it the first.
func (p *Port) Owner() string { return p.owner.Load().(string) }

// Asked is Spec without the guest's address, where none was asked for.
func (p *Port) Asked() flow.PortSpec {
	s := p.Spec
	s.Guest = netip.AddrPortFrom(p.asked.Guest.Addr(), s.Guest.Port())
	return s
}

// GuestFor returns what the clients of one of the Listens reach: the engine's
// address of their family where the PortSpec named none.
func (p *Port) GuestFor(listener netip.Addr) netip.AddrPort {
	if p.asked.Guest.Addr().IsValid() {
		return p.Spec.Guest
	}
	first, second := p.guest4, p.guest6
	if listener.Is6() && !listener.Is4In6() && !p.dual {
		first, second = second, first
	}
	if !first.IsValid() {
		first = second
	}
	return netip.AddrPortFrom(first, p.Spec.Guest.Port())
}

// Either reports whether clients may reach the engine's address of either family, whichever
// serves them: the PortSpec named none, and no container, which has its own.
func (p *Port) Either() bool { return !p.asked.Guest.Addr().IsValid() && !p.asked.Behind.IsValid() }

// Book is the book of published ports. It is safe for concurrent use; nothing waits
// for another port's /proc scan, guest or Carrier, but for the one scan that everybody
// who gets a conflict meanwhile needs.
type Book struct {
	cfg       Config
	inherited []inherited
	maxPorts  int
	maxSocks  int
	holders   holders
	lastID    atomic.Uint64

	reconciling sync.Map // by owner, a *sync.Mutex that Reconcile holds: two lists of one owner do not mix

	mu     sync.Mutex // guards the fields below, and those of every entry that say so
	rules  rules
	closed bool
	ports  int                                 // reserved, open or closing
	socks  int                                 // of those
	owners map[string]map[flow.PortSpec]*entry // by owner and normalized spec as asked
	taken  map[portKey][]*entry                // by protocol and host port, once it is known
	byID   map[uint64]*entry                   // those that listen
}

// New returns an empty Book and takes the ownership of cfg.Inherited.
func New(cfg Config) *Book {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Max <= 0 {
		cfg.Max = defaultMax
	}
	b := &Book{
		cfg:      cfg,
		maxPorts: cfg.Max,
		maxSocks: openFiles() / 4,
		owners:   make(map[string]map[flow.PortSpec]*entry),
		taken:    make(map[portKey][]*entry),
		byID:     make(map[uint64]*entry),
	}
	b.Update(cfg.Bind, cfg.Allowed, cfg.Source)
	b.inherited = inherit(cfg.Inherited, cfg.Log)
	return b
}

// defaultMax is how many ports are published at most: a range of a quarter of all.
const defaultMax = 16384

// Update changes what may be asked for from now on. Ports that are there stay.
func (b *Book) Update(bind string, allowed func(port uint16) bool, source flow.Source) {
	if source == "" {
		source = flow.SourcePreserve
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.rules = rules{bind, allowed, source}
}

// Add publishes a port for an owner and returns it once it is listening. What the
// owner has already, or shares from now on, is returned as it is. Errors are a *SpecError, *PolicyError or
// *ConflictError, or wrap ErrTooMany or net.ErrClosed, or are the system's.
func (b *Book) Add(owner string, s flow.PortSpec) (*Port, error) {
	asked, err := normalize(s)
	if err != nil {
		return nil, err
	}
	e, found, err := b.reserve(owner, asked)
	if err != nil {
		return nil, err
	}
	if found {
		return e.port, nil
	}
	if err = b.inside(asked); err == nil {
		err = b.open(e)
	}
	b.settle(e, err == nil)
	if err != nil {
		return nil, b.explain(e, owner, err)
	}
	b.cfg.Log.Debug("published", "port", e.port.Spec, "owner", owner, "listens", e.port.Listens)
	return e.port, nil
}

// Remove withdraws a port, whoever asked for it; the error wraps ErrNotFound.
func (b *Book) Remove(id uint64) error {
	b.mu.Lock()
	e := b.byID[id]
	b.mu.Unlock()
	if e == nil || !b.drop(e) {
		return fmt.Errorf("withdraw port %d: %w", id, ErrNotFound)
	}
	return nil
}

// RemoveSpec gives up the owner's port that s names: by what was asked for, or by
// the Spec that Add answered. Protocol, host and guest decide; what s leaves open of
// the guest's address, Behind, Source and ProxyProtocol does not. The error wraps ErrNotFound.
func (b *Book) RemoveSpec(owner string, s flow.PortSpec) error {
	asked, err := normalize(s)
	if err != nil {
		return err
	}
	if e := b.find(owner, asked); e == nil || !b.release(e, owner) {
		return fmt.Errorf("withdraw %v: %w", s, ErrNotFound)
	}
	return nil
}

func (b *Book) find(owner string, asked flow.PortSpec) *entry {
	b.mu.Lock()
	defer b.mu.Unlock()
	if e := b.owners[owner][asked]; e != nil {
		return e
	}
	for _, e := range b.owners[owner] {
		if names(asked, e.asked) || e.busy == nil && names(asked, e.port.Spec) {
			return e
		}
	}
	return nil
}

// RemoveOwner gives up all ports of an owner, also those it is just asking for.
func (b *Book) RemoveOwner(owner string) {
	for _, e := range b.of(owner) {
		b.release(e, owner)
	}
}

// of returns the owner's entries.
func (b *Book) of(owner string) []*entry {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Collect(maps.Values(b.owners[owner]))
}

// Reconcile makes the owner have exactly these ports. Those it has already are
// not touched; the others are given up before what is missing is published. It returns
// an error for each spec that could not be: the others stand. What is kept for
// an owner who reconciles is never forgotten, so they should be few.
func (b *Book) Reconcile(owner string, specs []flow.PortSpec) []error {
	one, _ := b.reconciling.LoadOrStore(owner, new(sync.Mutex))
	one.(*sync.Mutex).Lock()
	defer one.(*sync.Mutex).Unlock()
	var errs []error
	want := make(map[portKey][]flow.PortSpec)
	var order []flow.PortSpec
	for _, s := range specs {
		asked, err := normalize(s)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		k := portKey{asked.Proto, asked.Host.Port()}
		want[k] = append(want[k], asked)
		order = append(order, asked)
	}
	for _, e := range b.of(owner) {
		if !b.wanted(e, want) {
			b.release(e, owner)
		}
	}
	for _, s := range order {
		if _, err := b.Add(owner, s); err != nil {
			errs = append(errs, err)
		}
	}
	return errs
}

// wanted reports whether one of want means e.
func (b *Book) wanted(e *entry, want map[portKey][]flow.PortSpec) bool {
	if slices.Contains(want[portKey{e.asked.Proto, e.asked.Host.Port()}], e.asked) {
		return true
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.waitLocked(e) {
	}
	return !e.gone && slices.ContainsFunc(want[portKey{e.asked.Proto, e.port.Spec.Host.Port()}], e.means)
}

// List returns what listens, in the order of their IDs.
func (b *Book) List() []*Port {
	b.mu.Lock()
	defer b.mu.Unlock()
	list := make([]*Port, 0, len(b.byID))
	for _, e := range b.byID {
		list = append(list, e.port)
	}
	slices.SortFunc(list, func(p, q *Port) int { return cmp.Compare(p.ID, q.ID) })
	return list
}

// Held reports whether somebody else than owner has a port of the host, at whatever
// address. It is fast.
func (b *Book) Held(owner string, proto flow.Proto, port uint16) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.ContainsFunc(b.taken[portKey{proto, port}], func(e *entry) bool { return !e.has(owner) })
}

// Close withdraws everything; Add fails from now on with net.ErrClosed.
func (b *Book) Close() {
	b.mu.Lock()
	b.closed = true
	owners := slices.Collect(maps.Keys(b.owners))
	b.mu.Unlock()
	for _, o := range owners {
		b.RemoveOwner(o)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, in := range b.inherited {
		in.file.Close()
	}
	b.inherited = nil
}
