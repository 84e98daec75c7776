#!/usr/bin/env bash
# Create or update a development environment: deploy/venv.sh FOLDER (default .venv).
#
# Needs Python 3.11 or later with venv and pip, nothing else. PYTHON names another interpreter.
# FOLDER/.complete is written last and removed first: a folder without it is incomplete and is created
# again; a folder with it is updated in place.
set -euo pipefail

venv=${1:-.venv}
python=${PYTHON:-python3}
cpu_index=https://download.pytorch.org/whl/cpu
stamp=$venv/.complete
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf 'venv: %s\n' "$*"; }
die() { printf 'venv: %s\n' "$*" >&2; exit 1; }

new_enough='import sys; sys.exit(sys.version_info < (3, 11))'

command -v "$python" >/dev/null || die "$python not found; install Python 3.11 or later, or set PYTHON=/path/to/it"
"$python" -c "$new_enough" ||
    die "$("$python" --version 2>&1) is too old: kronos-stream needs Python 3.11 or later; set PYTHON=/path/to/it"

if [[ -e $stamp ]] && "$venv/bin/python" -c "$new_enough" 2>/dev/null; then
    say "updating $venv"
    rm "$stamp"
else
    # Clear a folder only if it is an environment or does not exist yet.
    if [[ -e $venv && ! -e $venv/pyvenv.cfg && -n $(ls -A "$venv" 2>/dev/null) ]]; then
        die "$venv exists and is not a Python environment; remove it or choose another folder"
    fi
    say "creating $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv" ||
        die "could not create $venv; on Debian and Ubuntu install the package python3-venv"
fi

# On a terminal pip shows its downloads; a log contains the steps below only.
quiet=()
[[ -t 1 ]] || quiet=(--quiet)

install() {
    "$venv/bin/python" -m pip --disable-pip-version-check install \
        ${quiet[@]+"${quiet[@]}"} -c "$root/constraints.txt" "$@"
}

has_nvidia_driver() {
    [[ -e /proc/driver/nvidia ]] || command -v nvidia-smi >/dev/null
}

# The time-out also limits a DNS look-up that hangs. macOS wheels are always CPU builds.
cpu_index_answers() {
    [[ $(uname -s) == Linux ]] && timeout 8 "$venv/bin/python" - "$cpu_index/torch/" <<'PY' 2>/dev/null
import sys
import urllib.request

urllib.request.urlopen(sys.argv[1], timeout=5).close()
PY
}

has_pinned_torch() {
    "$venv/bin/python" - "$root/constraints.txt" <<'PY' 2>/dev/null
import sys
from importlib.metadata import version

pins = open(sys.argv[1], encoding="utf-8").read().split()
sys.exit("torch==" + version("torch").partition("+")[0] not in pins)
PY
}

# Without a GPU the CPU build of torch saves gigabytes. Only torch comes from that index; its
# dependencies follow from PyPI, pinned like all others.
if has_pinned_torch; then
    say "torch is there already"
elif has_nvidia_driver; then
    say "NVIDIA driver found: taking the ordinary build of torch"
elif cpu_index_answers; then
    say "no NVIDIA driver: taking the CPU build of torch from $cpu_index"
    install --no-deps --index-url "$cpu_index" torch ||
        say "that failed: taking the ordinary build instead"
else
    say "no NVIDIA driver, but $cpu_index does not answer: taking the ordinary build of torch (gigabytes)"
fi

say "installing kronos-stream and its development tools (minutes the first time)"
# setuptools first and no build isolation: the build backend is pinned too.
install setuptools
install --no-build-isolation --editable "$root[dev]"

touch "$stamp"
say "$venv is complete"
