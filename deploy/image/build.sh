#!/usr/bin/env bash
# Build the image: build.sh [ARGUMENTS FOR THE BUILD…]
#
#   VARIANT=cpu|cuda                     build of torch
#   ENGINE=docker|podman                 container engine; by default the first that is installed
#   BASE=NAME                            another base image, or the same by digest
#   IMAGE=NAME                           name of the image (kronos-stream:$VARIANT)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

engine=${ENGINE:-$(command -v docker || command -v podman || true)}
[[ -n $engine ]] || { echo "image: neither docker nor podman is installed; or set ENGINE" >&2; exit 1; }
variant=${VARIANT:-cpu}
image=${IMAGE:-kronos-stream:$variant}

# From the checkout: version, commit, and the commit's time for all time stamps.
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
revision=$(git describe --always --abbrev=40 --exclude '*' --dirty 2>/dev/null || echo unknown)
epoch=$(git log -1 --format=%ct 2>/dev/null || echo 0)

arguments=(
    --build-arg "VARIANT=$variant"
    --build-arg "VERSION=$version"
    --build-arg "REVISION=$revision"
    --build-arg "SOURCE_DATE_EPOCH=$epoch"
)
if [[ -n ${BASE:-} ]]; then
    arguments+=(--build-arg "BASE=$BASE")
fi
# Podman's own format has no HEALTHCHECK, and older versions take labels from the cache although build
# arguments changed.
if [[ ${engine##*/} == podman* ]]; then
    arguments+=(
        --format docker
        --timestamp "$epoch"
        --label "io.kronos-stream.variant=$variant"
        --label "org.opencontainers.image.version=$version"
        --label "org.opencontainers.image.revision=$revision"
    )
fi

"$engine" build "${arguments[@]}" --tag "$image" "$@" .
echo "image: $image, version $version, revision $revision"
