#!/usr/bin/env bash
# Installs what the tests need from Debian or Ubuntu, when run as root where there
# is apt-get; otherwise says what is missing and the command that installs it.
# Quick and silent when all is there. Starts no service: a policy-rc.d forbids it
# while packages are being installed and is gone again afterwards.
set -euo pipefail

# COMMAND:PACKAGE
needed=(
	nft:nftables
	iptables:iptables           # dockerd calls it
	iptables-nft:iptables       # both flavours are tested
	iptables-legacy:iptables
	ip6tables-legacy:iptables
	ip:iproute2
	ss:iproute2
	unshare:util-linux
	nsenter:util-linux
	setpriv:util-linux
	newuidmap:uidmap
	dockerd:docker.io
	docker:docker.io
	containerd:containerd
	docker-registry:docker-registry
	docker-compose:docker-compose
	rootlessctl:rootlesskit
	nginx:nginx-light
	iperf3:iperf3
	podman:podman
	/usr/lib/podman/netavark:netavark
	busybox:busybox-static
	ping:iputils-ping
	traceroute:traceroute
	mtr:mtr-tiny
	curl:curl
	systemd-socket-activate:systemd # works without a systemd that runs
	sysctl:procps
	bash:bash
)

PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
packages=()
for entry in "${needed[@]}"; do
	if ! command -v "${entry%%:*}" >/dev/null 2>&1; then
		packages+=("${entry#*:}")
	fi
done
# A busybox that is not static does not run in an image made FROM scratch.
if command -v busybox >/dev/null && command -v dpkg-query >/dev/null &&
	! dpkg-query -W -f '${Status}' busybox-static 2>/dev/null | grep -q '^install ok'; then
	packages+=(busybox-static)
fi
dockerd=$(dirname "${BASH_SOURCE[0]}")/dockerd.sh
[ ${#packages[@]} -gt 0 ] || exec "$dockerd"
mapfile -t packages < <(printf '%s\n' "${packages[@]}" | sort -u)

if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
	echo "test/deps.sh: missing: ${packages[*]}" >&2
	echo "hint: sudo apt-get install --no-install-recommends ${packages[*]}" >&2
	echo "Tests that need them are skipped and say so." >&2
	# CI wants to know now, not after ten minutes.
	[ "${NETNS_TESTS:-}" != require ] || exit 1
	exit 0
fi

policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
	trap 'rm -f $policy' EXIT
	printf '#!/bin/sh\nexit 101\n' >$policy
	chmod 755 $policy
fi

export DEBIAN_FRONTEND=noninteractive
# Somebody else's apt-get may be at work, and a mirror may hiccup.
patient=(-o DPkg::Lock::Timeout=300 -o Acquire::Retries=5)
install() { apt-get install -y -qq --no-install-recommends -o Dpkg::Use-Pty=0 "${patient[@]}" "${packages[@]}"; }

echo "test/deps.sh: installing ${packages[*]}" >&2
log=$(mktemp)
if ! install >"$log" 2>&1; then
	# Perhaps the lists are old, or there are none yet.
	if ! { apt-get update -qq "${patient[@]}" && install; } >>"$log" 2>&1; then
		cat "$log" >&2
		rm -f "$log"
		echo "test/deps.sh: could not install ${packages[*]}" >&2
		exit 1
	fi
fi
rm -f "$log"
"$dockerd"
