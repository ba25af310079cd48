#!/usr/bin/env bash
# Make a virtual environment with a real SGLang that runs on CPU, and gms itself (editable):
#
#     tools/cpu_sglang.sh DIRECTORY [PYTHON]
#
# GMS_CPU_SGLANG chooses another version of the engine: 0.5.16, 0.5.20 and 0.5.23 work.
set -euo pipefail

cd "$(dirname "$0")/.."
directory=$1
python=${2:-python3}
version=${GMS_CPU_SGLANG:-0.5.20}
torch=torch==2.13.0 # where pip's index has a CPU build of it, that is taken

# The engine's own dependencies, less what only a GPU needs, which are gigabytes. So the engine, and what would bring triton or another torch along, are
# installed without dependencies. transformers is the one that all three versions work with.
engine=("sglang==$version" torchvision==0.28.0 "xgrammar==0.2.1" "compressed-tensors==0.18.0")
dependencies=(
    IPython aiohttp "apache-tvm-ffi==0.1.11" dill einops fastapi gguf huggingface_hub jsonschema loguru msgspec numpy "openai==2.6.1" orjson packaging
    partial_json_parser pillow psutil pybase64 pydantic python-multipart pyzmq requests sentencepiece setproctitle soundfile starlette tqdm
    "transformers==5.12.1" uvicorn uvloop
)

"$python" - <<'PY'
import sys

if sys.version_info < (3, 11):
    sys.exit(f"GMS needs Python 3.11 or newer, this is {sys.version.split()[0]}; say which to use: make PYTHON=python3.12 ...")
PY

echo "making $directory with SGLang $version for CPU; this takes a few minutes the first time"
[ -x "$directory/bin/python" ] || "$python" -m venv "$directory"
install() { "$directory/bin/python" -m pip install --quiet --quiet --disable-pip-version-check "$@"; }

install "$torch" "${dependencies[@]}" --editable .
install --no-deps "${engine[@]}" ./tests/sglang_on_cpu
