#!/usr/bin/env bash
# One archive of what a GPU machine without network lacks: wheels of this project and of the packages named, unpacked.
#
#   tools/make_gpu_bundle.sh OUT.tar.xz [PACKAGE ...]
#   tools/make_gpu_bundle.sh bundle.tar.xz megatron-core==0.19.2 av
#
# Without PACKAGE: megatron-core of setup.py, xxhash and psutil. No dependencies are fetched: name what the machine lacks (`pip list` there).
# PYTHON_VERSION (3.12) and PLATFORMS ("manylinux_2_28_x86_64 ...") say for which machine; TE_WHEELS may name a folder of
# further wheels, such as Transformer Engine's, built or pruned elsewhere.
#
# There:   mkdir -p SITE && tar -C SITE -xJf OUT.tar.xz && export PYTHONPATH=SITE
#          (run commands from the repository: its own code then comes first)
set -euo pipefail

fail() { echo "error: $1" >&2; exit 2; }
case ${1:-} in ''|-*) sed -n '2,13s/^# \{0,1\}//p' "$0"; exit 2 ;; esac
out=$(realpath -m "$1"); shift
[ ! -d "$out" ] || fail "$out is a directory; name the archive to write"
[ -w "$(dirname "$out")" ] || fail "$(dirname "$out") is no directory that can be written to"
[ -z "${TE_WHEELS:-}" ] || ls "$TE_WHEELS"/*.whl > /dev/null 2>&1 || fail "TE_WHEELS=$TE_WHEELS holds no wheels"
python=${PYTHON:-python3}
version=${PYTHON_VERSION:-3.12}
[[ $version =~ ^3\.(1[1-9]|[2-9][0-9])$ ]] || fail "PYTHON_VERSION=$version: 3.11 and newer can be packed for"
platforms=${PLATFORMS:-manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64}
repository=$(realpath "$(dirname "$0")/..")
packages=("$@")
if [ ${#packages[@]} -eq 0 ]; then
    # Two lines, the older for Python before 3.12.
    pins=$(sed -n 's/^ *"\(megatron-core==[^;"]*\).*/\1/p' "$repository/setup.py")
    case $version in 3.11) packages=("$(head -n 1 <<< "$pins")") ;; *) packages=("$(tail -n 1 <<< "$pins")") ;; esac
    packages+=(xxhash psutil)
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
tags=()
for platform in $platforms; do tags+=(--platform "$platform"); done

"$python" -m pip download --quiet --no-deps --only-binary=:all: --implementation cp --python-version "$version" \
    "${tags[@]}" --dest "$scratch/wheels" "${packages[@]}"
[ -z "${TE_WHEELS:-}" ] || cp "$TE_WHEELS"/*.whl "$scratch/wheels/"
"$python" -m pip install --quiet --no-index --no-deps --no-compile --only-binary=:all: --implementation cp \
    --python-version "$version" "${tags[@]}" --target "$scratch/site" "$scratch"/wheels/*.whl
rm -rf "$scratch/site/bin"
tar -C "$scratch/site" -c . | xz -6 -T0 > "$out"
ls "$scratch/wheels"
du -h "$out"
