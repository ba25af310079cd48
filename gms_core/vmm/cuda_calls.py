"""Calls of the CUDA driver, checked: a result that is no success becomes a typed error with the call and the result in words.

Importing this module needs cuda-bindings (12.8 or later, 13 too), but no GPU.
"""

from __future__ import annotations

import uuid
from typing import Any

from gms_core.errors import DeviceNotFound, DriverError, DriverUnavailable, OutOfMemory

try:
    from cuda.bindings import driver as cuda
except ImportError as error:
    raise DriverUnavailable(f"the Python bindings of CUDA cannot be imported: {error}", hint="Install them with: pip install 'gms[cuda]'") from error

__all__ = ["attribute", "checked", "cuda", "device_name", "device_uuid", "failure", "find_device", "initialise"]

_INITIALISATION_HINTS = {
    "CUDA_ERROR_NO_DEVICE": "No GPU is visible to this process: look at nvidia-smi -L and at CUDA_VISIBLE_DEVICES.",
    "CUDA_ERROR_NOT_INITIALIZED": "CUDA was initialised before this process was forked from its parent: start it by spawn instead.",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "Kernel module and libcuda are of different versions: restart the machine or the container.",
    "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE": "The CUDA compatibility package does not support this GPU: use the driver's own libcuda.",
}


def checked(call: str, *arguments: Any, about: str = "") -> Any:
    """Make one call of the driver.

    Args:
        call: Its name, such as ``cuMemMap``.
        arguments: As the bindings take them.
        about: Sizes and addresses, for the message.

    Returns:
        None, the value, or a tuple of the values that the call gives.

    Raises:
        OutOfMemory: The device has no room.
        DriverUnavailable: The driver, or this call in it, is missing.
        DriverError: Any other failure.
    """
    name, words, values = _attempt(call, arguments)
    if not name:
        return values[0] if len(values) == 1 else values or None
    raise _refused(call, name, words, about)


def failure(call: str, result: int, about: str = "") -> DriverError:
    """The error of a call that was not made by the bindings.

    Args:
        call: Its name.
        result: What it gave, which is not success.
        about: Sizes and addresses, for the message.
    """
    try:
        known = cuda.CUresult(result)
    except ValueError:
        return _refused(call, str(result), "", about)
    return _refused(call, _text("cuGetErrorName", known) or known.name, _text("cuGetErrorString", known), about)


def initialise() -> None:
    """Initialise the driver in this process; it creates no context. Idempotent.

    A process that forks after this call has children that cannot use CUDA.

    Raises:
        DriverUnavailable: No driver, or no GPU that this process can see.
    """
    name, words, _ = _attempt("cuInit", (0,))
    if name:
        hint = _INITIALISATION_HINTS.get(name, "Look at nvidia-smi: it must list the GPUs of this machine.")
        raise DriverUnavailable(_sentence("cuInit", name, words, ""), hint=hint, details={"call": "cuInit", "result": name})


def find_device(identifier: str) -> int:
    """The device of a UUID, among those that this process sees.

    Raises:
        DeviceNotFound: It is not among them.
        DriverUnavailable: No driver, or no GPU that this process can see.
    """
    initialise()
    seen = []
    for ordinal in range(checked("cuDeviceGetCount")):
        device = int(checked("cuDeviceGet", ordinal))
        seen.append(device_uuid(device))
        if seen[-1] == identifier:
            return device
    raise DeviceNotFound(f"this process sees no device {identifier}, only {', '.join(seen) or 'none'}", hint="Look at CUDA_VISIBLE_DEVICES.")


def device_uuid(device: int) -> str:
    """The UUID as NVML writes it: ``GPU-…``, or ``MIG-…`` of an instance."""
    # The first form of the call tells the UUID of the whole GPU for an instance. Bindings of CUDA 13 have the second form under the plain name.
    call = "cuDeviceGetUuid_v2" if hasattr(cuda, "cuDeviceGetUuid_v2") else "cuDeviceGetUuid"
    value = uuid.UUID(bytes=bytes(checked(call, device).bytes))
    return f"{'MIG' if ' MIG ' in device_name(device) else 'GPU'}-{value}"


def device_name(device: int) -> str:
    """The product's name, such as ``NVIDIA H200``; that of an instance holds ``MIG`` and its profile."""
    name: bytes = checked("cuDeviceGetName", 256, device)
    return name.split(b"\0", 1)[0].decode(errors="replace").strip()


def attribute(name: str, device: int) -> int:
    """The value of a device attribute; 0 when the bindings do not know it. ``name`` is without ``CU_DEVICE_ATTRIBUTE_``."""
    kind = getattr(cuda.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}", None)
    return 0 if kind is None else int(checked("cuDeviceGetAttribute", kind, device, about=name))


def _attempt(call: str, arguments: tuple[Any, ...]) -> tuple[str, str, tuple[Any, ...]]:
    """The result's name (empty for success), its words, and the values."""
    try:
        result, *values = getattr(cuda, call)(*arguments)
    except (AttributeError, RuntimeError) as error:
        # The bindings raise RuntimeError for a library that cannot be loaded and for a function that is not in it.
        raise DriverUnavailable(f"{call} cannot be called: {error}", hint="Install a newer NVIDIA driver; nvidia-smi tells its version.") from error
    except ValueError as error:
        raise DriverError(f"{call} failed with a result that the bindings do not know: {error}", hint="Install a newer cuda-bindings.") from error
    if int(result) == 0:
        return "", "", tuple(values)
    return _text("cuGetErrorName", result) or str(getattr(result, "name", result)), _text("cuGetErrorString", result), ()


def _text(call: str, result: Any) -> str:
    status, text = getattr(cuda, call)(result)
    return text.decode(errors="replace") if int(status) == 0 and text else ""


def _refused(call: str, name: str, words: str, about: str) -> DriverError:
    kind = OutOfMemory if name == "CUDA_ERROR_OUT_OF_MEMORY" else DriverError
    return kind(_sentence(call, name, words, about), details={"call": call, "result": name})


def _sentence(call: str, name: str, words: str, about: str) -> str:
    return f"{call} failed: {name}{f' ({words})' if words else ''}{f'; {about}' if about else ''}"
