#!/usr/bin/env bash
# Fetch the tools that check the chart and the compose file: tools.sh FOLDER
#
# helm and kubeconform are built by Go (1 to 3 minutes on two cores, the first time), schemas come
# from PyPI and Go modules. Needs Go 1.21 or later, and Python with pip and PyYAML: PYTHON names it.
# FOLDER/.complete is written last and contains the versions below; a change fetches them again.
set -euo pipefail

folder=${1:?usage: tools.sh FOLDER}
python=$(command -v "${PYTHON:-.venv/bin/python}") || { echo "tools: no Python: make setup" >&2; exit 1; }
[[ $python == /* ]] || python=$PWD/$python
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

helm=helm.sh/helm/v3/cmd/helm@v3.22.0
kubeconform=github.com/yannh/kubeconform/cmd/kubeconform@v0.8.0
kubernetes=kubernetes-validate==1.37.0
crds=(github.com/kedacore/keda/v2@v2.21.0
      github.com/prometheus-operator/prometheus-operator@v0.85.0)
compose=github.com/compose-spec/compose-go/v2@v2.16.2

say() { printf 'tools: %s\n' "$*"; }
die() { printf 'tools: %s\n' "$*" >&2; exit 1; }

versions="$helm $kubeconform $kubernetes ${crds[*]} $compose $(cksum <"$here/schemas.py")"
if [[ -e $folder/.complete && $(<"$folder/.complete") == "$versions" ]]; then
    exit 0
fi
command -v go >/dev/null || die "no go on PATH: helm and kubeconform are built by it; https://go.dev/dl"
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
rm -rf "$folder/.complete" "$folder/schemas" "$folder/wheel"

# In a folder without a Go module, with time-outs for downloads.
for tool in "$kubeconform" "$helm"; do
    say "building $tool"
    (cd "$folder" && GOBIN=$folder timeout 1200 go install -ldflags='-s -w' "$tool") \
        2>"$folder/build.log" || die "$tool: not built; see $folder/build.log"
done

say "schemas of Kubernetes, KEDA, Prometheus' operator and compose"
timeout 300 "$python" -m pip --disable-pip-version-check download --quiet --no-deps \
    --only-binary :all: --dest "$folder/wheel" "$kubernetes" || die "$kubernetes: not fetched"
modules=()
for module in "${crds[@]}" "$compose"; do
    modules+=("$(cd "$folder" && timeout 300 go mod download -json "$module" |
        "$python" -c 'import json, sys; print(json.load(sys.stdin)["Dir"])')") ||
        die "$module: not fetched"
done
"$python" "$here/schemas.py" "$folder/schemas" "$folder"/wheel/*.whl "${modules[@]}"
rm -rf "$folder/wheel"

printf '%s\n' "$versions" >"$folder/.complete"
say "$folder is complete"
