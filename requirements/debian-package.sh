#!/bin/sh
# Make sure that something the system must provide is there: debian-package.sh PACKAGE PROBE REASON
# PROBE is a shell command that succeeds when it is there. As root on Debian the package is installed; elsewhere
# the reason and the command are printed, and the caller goes on: what needs it says so itself.
package=$1 probe=$2 reason=$3
sh -c "$probe" >/dev/null 2>&1 && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  apt-get update && apt-get install -y --no-install-recommends "$package" && exit 0
fi
echo "missing: $reason; install it with: apt-get install $package" >&2
