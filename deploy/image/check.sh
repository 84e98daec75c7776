#!/usr/bin/env bash
# Build the image and test it in a container: check.sh BIN [ARGUMENTS FOR THE BUILD…]
#
# BIN is the folder of the tests' Python. ENGINE and VARIANT are as for build.sh. If the base image
# cannot be pulled and BASE is not set, one is created from Debian packages (base.sh).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

bin=$1
engine=${ENGINE:-$(command -v docker || command -v podman || true)}
[[ -n $engine ]] || { echo "image: neither docker nor podman is installed; or set ENGINE" >&2; exit 1; }
export ENGINE=$engine IMAGE=${IMAGE:-localhost/kronos-stream:check}

if [[ -z ${BASE:-} ]]; then
    base=$(sed -n 's/^ARG BASE=//p' Dockerfile)
    if ! "$engine" pull --quiet "$base"; then
        BASE=localhost/kronos-base:bookworm
        echo "image: $base cannot be fetched; $BASE made from Debian's packages stands in"
        "$engine" image inspect "$BASE" >/dev/null 2>&1 || deploy/image/base.sh "$BASE"
        export BASE
    fi
fi
deploy/image/build.sh "${@:2}"
KRONOS_IMAGE=$IMAGE KRONOS_ENGINE=$engine "$bin/python" -m pytest tests/deploy/test_image_built.py
