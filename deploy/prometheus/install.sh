#!/bin/sh
# Puts promtool and prometheus into a folder: links to the installed ones, or else the programs of Debian's package. Needs no root.
set -eu

target=$(cd "$1" && pwd)
rm -f "$target/promtool" "$target/prometheus"

if promtool=$(command -v promtool) && prometheus=$(command -v prometheus); then
    ln -sf "$promtool" "$prometheus" "$target"
    exit
fi
if ! command -v apt-get dpkg-deb >/dev/null; then
    echo "promtool and prometheus are missing: install Prometheus" >&2
    exit 1
fi

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
mkdir -p lists/partial archives/partial
# The lists of the machine may be missing or old, and only root may bring them up to date. A list that cannot be had matters only
# if it has the package.
options="-qq -o Dir::State::Lists=$folder/lists -o Dir::Cache=$folder -o APT::Sandbox::User=$(id -un)"
apt-get download -qq prometheus 2>/dev/null || {
    apt-get $options update || true
    apt-get $options download prometheus
}
dpkg-deb --extract prometheus_*.deb unpacked
cp unpacked/usr/bin/promtool unpacked/usr/bin/prometheus "$target"
