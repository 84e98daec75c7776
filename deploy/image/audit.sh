#!/usr/bin/env bash
# Check the pinned versions for known vulnerabilities on PyPI: audit.sh PIP-AUDIT [ITS OPTIONS…]
#
# Exit code 0: none except those explained in deploy/image/audit-ignore.txt. A package that could not
# be checked counts as a finding.
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

# The pins are complete, so nothing is resolved; --strict fails at the first unknown package.
"$pip_audit" --requirement constraints.txt --no-deps --disable-pip --strict --progress-spinner off \
    --aliases on --desc on ${ignored[@]+"${ignored[@]}"} "${@:2}"
