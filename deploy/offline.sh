#!/usr/bin/env bash
# mask2ct on a machine without a network:
#   deploy/offline.sh bundle DIR [EXTRAS [PIP OPTION...]]   where there is one: everything, with the SHA-256 of each file
#   DIR/offline.sh install VENV                             where there is none: checks each file, asks nobody, writes VENV/sbom.json
# EXTRAS such as onnx,dicom. For another system or Python: bundle DIR onnx --platform manylinux_2_28_x86_64 --python-version 3.12
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}

bundle() {
    local folder=$1 extras=${2:-onnx}
    shift $(($# > 1 ? 2 : 1))
    [ ! -e "$folder" ] || { echo "error: $folder exists; name a new folder" >&2; exit 2; }
    mkdir -p "$folder/wheels"
    folder=$(cd "$folder" && pwd)
    "$python" -m pip wheel --quiet --no-deps --wheel-dir "$folder/wheels" "$here/.."
    "$python" -m pip download --quiet --only-binary :all: --dest "$folder/wheels" "$@" "$(echo "$folder"/wheels/mask2ct-*.whl)[$extras]"
    (cd "$folder/wheels" && sha256sum -- *.whl) | while read -r digest wheel; do
        IFS=- read -r name version _ <<< "$wheel"
        echo "$name==$version --hash=sha256:$digest"
    done > "$folder/requirements.txt"
    cp "$here/offline.sh" "$here/sbom.py" "$folder/"
    echo "$(wc -l < "$folder/requirements.txt") wheels, $(du -sh "$folder" | cut -f1) in $folder"
}

install() {
    local venv=$1
    [ -f "$here/requirements.txt" ] || { echo "error: this is no bundle; run the offline.sh that lies in one" >&2; exit 2; }
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --no-index --find-links "$here/wheels" --no-deps --require-hashes -r "$here/requirements.txt"
    "$venv/bin/python" -m pip check --quiet
    "$venv/bin/python" "$here/sbom.py" --output "$venv/sbom.json"
    "$venv/bin/mask2ct" --version
}

case "${1:-} $#" in
    "bundle "[2-9]* | "install 2") "$@" ;;
    *) sed -n '2,5s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
