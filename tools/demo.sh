#!/usr/bin/env bash
# Run the demo with the given Python if it has a GPU and a CUDA vLLM, else in .venv on CPU:
#
#     tools/demo.sh PYTHON
set -euo pipefail

python=$1
if "$python" - 2>/dev/null <<'PY'; then
import importlib.util
import sys

if importlib.util.find_spec("vllm") is None:
    sys.exit(1)
import torch

sys.exit(not torch.cuda.is_available())
PY
    echo "a GPU and a CUDA vLLM are here: using $python"
    "$python" -c 'import gms_core, gms_vllm, pynvml; import cuda.bindings.driver' 2>/dev/null ||
        "$python" -m pip install --quiet --quiet --disable-pip-version-check --editable '.[cuda]'
else
    echo "no GPU with a CUDA vLLM in $python: using a vLLM for CPU in .venv"
    make --no-print-directory environment PYTHON="$python"
    python=.venv/bin/python
fi
exec "$python" examples/share_weights/demo.py
