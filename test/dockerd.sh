#!/usr/bin/env bash
# Builds a current dockerd, which Debian does not have, once: into
# $XDG_CACHE_HOME/slipway-test or ~/.cache/slipway-test, through Go modules, in three to
# six minutes on two cores. Quick and silent when it is there. Where it cannot be built
# the tests that need it are skipped and say so.
set -euo pipefail

version=v2.0.0-beta.24 # of module github.com/moby/moby/v2; the next after Docker 29
cache=${XDG_CACHE_HOME:-$HOME/.cache}/slipway-test
dir=$cache/dockerd-$version

[ ! -x "$dir/dockerd" ] || exit 0

fail() {
	echo "test/dockerd.sh: $1" >&2
	echo "Tests that need a current dockerd are skipped and say so." >&2
	# CI wants to know now, not after ten minutes.
	[ "${NETNS_TESTS:-}" != require ] || exit 1
	exit 0
}

# No other dockerd is of use to tests that nobody but root can run.
[ "$(id -u)" = 0 ] || exit 0
command -v go >/dev/null || fail "go is not installed"

mkdir -p "$cache"
new=$(mktemp -d "$cache/new.XXXXXX")
trap 'rm -rf "$new"' EXIT
echo "test/dockerd.sh: building dockerd $version into $dir, once" >&2
cd / # no module of ours
build() {
	CGO_ENABLED=0 GOFLAGS=-mod=mod GOBIN=$new nice -n 10 go install -trimpath -ldflags '-s -w' \
		"github.com/moby/moby/v2/cmd/dockerd@$version" >"$new/log" 2>&1
}
for try in 1 2 3; do # the network may fail once; what is there already is not fetched again
	! build || break
	tail -n 5 "$new/log" >&2
	[ $try -lt 3 ] || fail "could not build dockerd $version"
	sleep 10
done
mkdir -p "$dir"
mv "$new/dockerd" "$dir/dockerd"
