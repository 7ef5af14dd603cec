package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/slipway-net/slipway/internal/config"
	"github.com/slipway-net/slipway/internal/daemon"
)

// dockerSocket is the socket of a dockerd in its engine's state directory.
const dockerSocket = "docker.sock"

func newDocker() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "docker ENGINE -- ARG...",
		Short: "Run the docker client against an engine's dockerd",
		Long: "Run the docker client with ARGs against the dockerd of a running engine that is configured with\n" +
			"kind = \"dockerd\". Its socket is docker.sock in the engine's state directory, for other clients.\n" +
			"The exit status is the client's.",
		Example: "  slipway docker web -- run --rm -p 8080:80 nginx\n  slipway docker web -- compose up",
		Args:    words(1, -1, "ENGINE"), ValidArgsFunction: completeEngine,
		RunE: func(cmd *cobra.Command, args []string) error {
			if cmd.ArgsLenAtDash() == 0 {
				return usage(cmd, errors.New("ENGINE is missing"))
			}
			name, args := args[0], args[1:]
			if err := config.CheckName(name); err != nil {
				return usage(cmd, err)
			}
			if len(args) > 0 && args[0] == "--" {
				args = args[1:]
			}
			socket, err := socketOf(cmd.Context(), name)
			if err != nil {
				return err
			}
			return execDocker("unix://"+socket, args)
		},
	}
	cmd.Flags().SetInterspersed(false) // ARGs' flags are docker's
	return cmd
}

// socketOf is where the dockerd of a running engine listens.
func socketOf(ctx context.Context, name string) (string, error) {
	c, err := daemon.ClientOf(name)
	if err != nil {
		return "", err
	}
	defer c.Close()
	info, err := askOne(ctx, c.Info)
	if err != nil {
		return "", err
	}
	socket := filepath.Join(info.StateDir, dockerSocket)
	if _, err := os.Stat(socket); err != nil {
		p := &daemon.Problem{Err: fmt.Errorf("docker on %s: %w", name, err)}
		if errors.Is(err, fs.ErrNotExist) {
			p.Err = fmt.Errorf("docker on %s: there is no %s", name, socket)
			p.Hint = fmt.Sprintf("dockerd may be starting; it has one when [engine.%s] has kind = \"dockerd\" and slipway up started it", name)
		}
		return "", p
	}
	return socket, nil
}

// execDocker becomes the docker client. It returns only with an error.
func execDocker(host string, args []string) error {
	path, err := exec.LookPath("docker")
	if err != nil {
		return &daemon.Problem{
			Err:  errors.New("exec on docker: not found in PATH"),
			Hint: "install a docker client, or give another one DOCKER_HOST=" + host,
			Code: codeNotFound,
		}
	}
	err = syscall.Exec(path, append([]string{"docker", "-H", host}, args...), dockerEnv(os.Environ(), host))
	return &daemon.Problem{Err: fmt.Errorf("exec on %s: %w", path, err), Code: codeNotExecutable}
}

// The exit statuses of a POSIX shell for a program that cannot be run.
const (
	codeNotExecutable = 126
	codeNotFound      = 127
)

// dockerEnv is env with nothing that leads a docker client, or a plugin of it, to another
// engine or has it ask for TLS on our socket.
func dockerEnv(env []string, host string) []string {
	others := []string{"DOCKER_CONTEXT", "DOCKER_TLS", "DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH"}
	kept := slices.DeleteFunc(slices.Clone(env), func(e string) bool {
		name, _, _ := strings.Cut(e, "=")
		return slices.Contains(others, name)
	})
	return setEnv(kept, map[string]string{"DOCKER_HOST": host})
}
