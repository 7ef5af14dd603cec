package arch

import (
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/slipway-net/slipway/"

// mayImport says which of our own packages each package may import: itself being
// the longest key that is a prefix of its path. A trailing "/" takes in the
// folders below.
var mayImport = []struct {
	pkg string
	may []string
	why string
}{
	{"internal/flow", nil, "the shared words are the bottom of the tree"},
	{"internal/flow/table", []string{"internal/flow"}, "the table knows flows, not who makes them"},
	{"internal/config", []string{"internal/flow"}, "a config file is checked without linking more than the shared words"},
	{"internal/nsagent", nil, "the agent starts in every namespace: it has to be small and knows no flows"},
	{"internal/loop", nil, "a loop waits for descriptors and knows nothing of what they are"},
	{"stack/kernel", []string{"internal/flow", "internal/loop", "stack/link"}, "a stack asks forward through its own interface"},
	{"stack/link", []string{"internal/flow"}, "a link carries packets and knows nothing of who reads them"},
	{"stack/netstack", []string{"internal/flow", "stack/link"}, "a stack asks forward through its own interface"},
	{"forward", []string{"internal/flow", "internal/flow/table", "internal/loop"}, "siblings do not import each other; the daemon introduces them"},
	{"forward/publish", []string{"internal/flow"}, "the book of ports listens and knows nothing of how bytes travel"},
	{"internal/engine/docker", []string{"internal/flow"}, "it reads an engine's API and tells which ports to publish"},
	{"internal/engine/listeners", []string{"internal/flow"}, "it reads what listens and tells which ports to publish"},
	{"internal/dockerproxy", []string{"internal/flow", "internal/api", "forward/publish"}, "it is a client of the daemon, inside the engine, and names who has a port there as the book does on the host"},
	{"dns", []string{"internal/flow"}, "siblings do not import each other; the daemon introduces them"},
	{"internal/api", []string{"internal/flow", "internal/flow/table", "internal/config"}, "siblings do not import each other; the daemon introduces them"},
	{"internal/daemon", []string{"internal/", "stack/", "forward/", "forward", "dns"}, "the daemon knows everybody but the command line"},
	{"cmd/", []string{"internal/api", "internal/config", "internal/daemon", "internal/dockerproxy", "internal/doctor", "internal/flow", "internal/nsagent", "internal/probe"}, "the command line reaches the parts through the daemon and the API"},
	{"test/", []string{"test/"}, "the tests there are black box, against the built binary"},
	{"test", []string{"test/"}, "the tests there are black box, against the built binary"},
	{"internal/probe", nil, "a probe is a guest: it knows nothing of what carries it"},
	{"internal/doctor", []string{"stack/link"}, "the doctor looks at a host before anything runs; a link tells which offloads the kernel has"},
	{"internal/arch", nil, "it tests the tree from outside"},
	{"internal/tally", nil, "it reads what go test prints"},
}

// mustNotDepend are dependencies, direct or not, that a package has no use for.
var mustNotDepend = []struct{ pkg, on, why string }{
	{"forward", "gvisor.dev/", "only stack knows gVisor; forward sees flow.Conn and flow.Guest"},
	{"dns", "gvisor.dev/", "only stack knows gVisor; dns sees net.PacketConn and net.Listener"},
	{"internal/api", "gvisor.dev/", "only stack knows gVisor"},
	{"internal/config", "gvisor.dev/", "a config file is checked without linking the stack"},
	{"internal/nsagent", "gvisor.dev/", "the agent starts in every namespace and has to be small"},
	{"internal/nsagent", "github.com/spf13/cobra", "the agent has no command line"},
	{"internal/flow", "golang.org/x/", "the shared words need the standard library only"},
	{"dns", "github.com/vishvananda/netlink", "dns works on every operating system"},
	{"forward", "github.com/vishvananda/netlink", "routes are the host kernel's business: forward only dials"},
}

// onlyIn are modules that only these folders, and the tests, import directly.
var onlyIn = []struct {
	module  string
	folders []string
	why     string
}{
	{"gvisor.dev/", []string{"stack/"}, "everybody else sees the words of internal/flow"},
	{"github.com/spf13/cobra", []string{"cmd/"}, "one folder knows the command line"},
	{"github.com/miekg/dns", []string{"dns", "internal/probe"}, "one side answers DNS messages and one asks"},
}

// pkg is a package of ours as one operating system sees it.
type pkg struct {
	path string // below the module
	imports,
	deps []string
}

func list(t *testing.T, goos string) []pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-f", `{{.ImportPath}}|{{join .Imports ","}}|{{join .Deps ","}}`, "./...")
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "GOOS="+goos, "CGO_ENABLED=0")
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list on %s: %v\n%s", goos, err, stderr.String())
	}
	var pkgs []pkg
	for line := range strings.Lines(string(out)) {
		f := strings.Split(strings.TrimSpace(line), "|")
		path := strings.TrimPrefix(f[0], module)
		pkgs = append(pkgs, pkg{path, strings.Split(f[1], ","), strings.Split(f[2], ",")})
	}
	return pkgs
}

func TestImports(t *testing.T) {
	for _, goos := range []string{"linux", "windows", "darwin"} {
		t.Run(goos, func(t *testing.T) {
			for _, p := range list(t, goos) {
				checkOwnImports(t, p)
				for _, r := range mustNotDepend {
					for _, dep := range p.deps {
						if covers(r.pkg, p.path) && strings.HasPrefix(dep, r.on) {
							t.Errorf("%s depends on %s: %s", p.path, dep, r.why)
						}
					}
				}
				for _, r := range onlyIn {
					for _, imp := range p.imports {
						may := slices.ContainsFunc(append(r.folders, "test/"), func(f string) bool { return covers(f, p.path) })
						if strings.HasPrefix(imp, r.module) && !may {
							t.Errorf("%s imports %s, which belongs to %q: %s", p.path, imp, r.folders, r.why)
						}
					}
				}
			}
		})
	}
}

// checkOwnImports holds p against the longest rule that covers it.
func checkOwnImports(t *testing.T, p pkg) {
	best := -1
	for i, r := range mayImport {
		if covers(r.pkg, p.path) && (best < 0 || len(r.pkg) > len(mayImport[best].pkg)) {
			best = i
		}
	}
	if best < 0 {
		t.Errorf("%s has no rule in mayImport: say what it may import, and why", p.path)
		return
	}
	r := mayImport[best]
	for _, imp := range p.imports {
		own, isOwn := strings.CutPrefix(imp, module)
		if !isOwn || covers(p.path, own) {
			continue
		}
		if !slices.ContainsFunc(r.may, func(may string) bool { return covers(may, own) }) {
			t.Errorf("%s imports %s: %s", p.path, own, r.why)
		}
	}
}

// covers says whether a rule's folder is path or, with a trailing "/", above it.
func covers(folder, path string) bool {
	return folder == path || strings.HasSuffix(folder, "/") && strings.HasPrefix(path+"/", folder)
}
