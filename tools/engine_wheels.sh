#!/usr/bin/env bash
# Download the CUDA wheels of vLLM that the contract tests read (they are never installed; about 300 MB each):
#
#     tools/engine_wheels.sh DIRECTORY PYTHON VERSION...
set -euo pipefail

directory=$1
python=$2
shift 2
mkdir -p "$directory"
for version in "$@"; do
    if ! compgen -G "$directory/vllm-$version-*.whl" >/dev/null; then
        echo "downloading the wheel of vLLM $version"
        # Into a directory of its own first: a download that was cut off must not look complete.
        "$python" -m pip download --quiet --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
            --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --platform manylinux1_x86_64 --dest "$directory/part" "vllm==$version"
        mv "$directory/part/"*.whl "$directory/"
    fi
done
rm -rf "$directory/part"
