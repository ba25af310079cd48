"""Make ``gms_core/snapshot/kernels/*.ptx`` from the sources beside them: ``make kernels``.

It needs NVRTC and no GPU. An old one is wanted: its PTX is understood by every driver since, so by all that GMS runs with.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
from pathlib import Path

KERNELS = Path(__file__).parents[1] / "gms_core" / "snapshot" / "kernels"
OPTIONS = (b"--gpu-architecture=compute_70", b"--std=c++14")


def main() -> int:
    """Compile all sources with the library that the first argument names."""
    (library,) = sys.argv[1:]
    # The library looks for its other half by name, and not beside itself.
    for builtins in Path(library).parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    nvrtc = ctypes.CDLL(library)
    for source in KERNELS.glob("*.cu"):
        text = source.read_bytes()
        ptx = compiled(nvrtc, source.name, text)
        source.with_suffix(".ptx").write_text(f"// Made from {source.name}, sha256 {hashlib.sha256(text).hexdigest()}\n{ptx}")
    return 0


def compiled(nvrtc: ctypes.CDLL, name: str, text: bytes) -> str:
    """The PTX of one source."""
    program = ctypes.c_void_p()
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, name.encode(), 0, None, None))
    failed = nvrtc.nvrtcCompileProgram(program, len(OPTIONS), (ctypes.c_char_p * len(OPTIONS))(*OPTIONS))
    if failed:
        sys.exit(f"{name} cannot be compiled:\n{_text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)}")
    ptx = _text(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program)
    _check(nvrtc.nvrtcDestroyProgram(ctypes.byref(program)))
    return ptx


def _text(size_of: ctypes._NamedFuncPointer, text_of: ctypes._NamedFuncPointer, program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    _check(size_of(program, ctypes.byref(size)))
    text = ctypes.create_string_buffer(size.value)
    _check(text_of(program, text))
    return text.value.decode()


def _check(result: int) -> None:
    if result:
        sys.exit(f"NVRTC failed with {result}")


if __name__ == "__main__":
    sys.exit(main())
