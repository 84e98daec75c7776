#!/usr/bin/env bash
# Create a base image from Debian packages if no registry can be reached: base.sh NAME
#
# A stand-in for python:3.11-slim-bookworm, of the same release and Python, for `make image-check`;
# not for production. Needs root, mmdebstrap and podman (or docker, set ENGINE).
set -euo pipefail

name=$1
engine=${ENGINE:-podman}
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
rootfs=$(mktemp)
trap 'rm -f "$rootfs"' EXIT

# As in the official image: Python with venv, certificates, time zones.
mmdebstrap --quiet --mode=root --variant=minbase --format=tar \
    --include=ca-certificates,netbase,python3,python3-venv,tzdata \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
    bookworm "$rootfs" "$mirror"
"$engine" import "$rootfs" "$name"
