#!/usr/bin/env bash
# Download the wheels of engines that the contract tests read (they are never installed; 15 to 40 MB each for SGLang, 300 MB for vLLM):
#
#     tools/engine_wheels.sh DIRECTORY PYTHON ENGINE==VERSION...
set -euo pipefail

directory=$1
python=$2
shift 2
mkdir -p "$directory"
for wanted in "$@"; do
    if ! compgen -G "$directory/${wanted/==/-}-*.whl" >/dev/null; then
        echo "downloading the wheel of $wanted"
        # Into a directory of its own first: a download that was cut off must not look complete.
        "$python" -m pip download --quiet --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.11 \
            --platform manylinux_2_34_x86_64 --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --platform manylinux1_x86_64 \
            --dest "$directory/part" "$wanted"
        mv "$directory/part/"*.whl "$directory/"
    fi
done
rm -rf "$directory/part"
