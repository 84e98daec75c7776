#!/usr/bin/env bash
# Ask PyPI whether pinned versions have known faults: audit.sh PIP-AUDIT [ITS OPTIONS…]
#
# Exit code 0: none that deploy/image/audit-ignore.txt does not explain. What cannot be asked about
# counts as a fault: an audit of nothing finds nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

pip_audit=$1
ignored=()
while read -r id reason; do
    if [[ -z $id || $id == '#'* ]]; then
        continue
    fi
    [[ -n $reason ]] || { echo "audit: $id is ignored without a reason" >&2; exit 2; }
    ignored+=(--ignore-vuln "$id")
done <deploy/image/audit-ignore.txt

# The pins are complete, so nothing is resolved; --strict: the first that is unknown ends it.
"$pip_audit" --requirement constraints.txt --no-deps --disable-pip --strict --progress-spinner off \
    --aliases on --desc on ${ignored[@]+"${ignored[@]}"} "${@:2}"
