"""Names of devices. A GPU is named by its UUID, as CUDA and NVML both report it, never by an index."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NewType

from gms_core.errors import DeviceNotFound, DriverUnavailable, InvalidArgument

DeviceId = NewType("DeviceId", str)
"""``host``, or a UUID: ``GPU-…``, or ``MIG-…`` for an instance."""

HOST = DeviceId("host")
"""The device that is the machine's own memory."""


_NAME = re.compile(r"host|(?:GPU|MIG)-[0-9A-Za-z-]+")


def device_id(name: str) -> DeviceId:
    """The device that a user names, whether or not this machine has it.

    Raises:
        InvalidArgument: No device can have that name.
    """
    if _NAME.fullmatch(name) is None:
        raise InvalidArgument(f"{name!r} is no device", hint="Name host, or a GPU by the UUID that nvidia-smi -L shows: GPU-… or MIG-….")
    return DeviceId(name)


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU, or one MIG instance.

    Attributes:
        name: The product's name.
        total_bytes: Of its memory.
    """

    id: DeviceId
    name: str
    total_bytes: int


def list_gpus() -> list[Device]:
    """All GPUs of this machine, whatever ``CUDA_VISIBLE_DEVICES`` says; where MIG is on, the instances in place of their GPU.

    It asks NVML and leaves CUDA uninitialised, so the process can still fork.

    Raises:
        DriverUnavailable: NVML or its bindings are missing.
    """
    nvml = _nvml(os.getpid())
    try:
        return [
            Device(DeviceId(nvml.nvmlDeviceGetUUID(handle)), nvml.nvmlDeviceGetName(handle), int(nvml.nvmlDeviceGetMemoryInfo(handle).total))
            for handle in _handles(nvml)
        ]
    except nvml.NVMLError as error:
        raise DriverUnavailable(f"NVML cannot describe the GPUs: {error}", hint="Look at nvidia-smi: it must list them.") from error


def cuda_uuid(ordinal: int) -> DeviceId:
    """The device that a CUDA ordinal means in this process. It initialises CUDA: do not fork afterwards.

    Raises:
        DeviceNotFound: This process sees no device of that ordinal.
        DriverUnavailable: The driver or its bindings are missing.
    """
    from gms_core.vmm.cuda_calls import checked, device_uuid, initialise

    initialise()
    count = int(checked("cuDeviceGetCount"))
    if not 0 <= ordinal < count:
        raise DeviceNotFound(f"this process sees no CUDA device {ordinal}; it sees {count}", hint="Look at CUDA_VISIBLE_DEVICES.")
    return DeviceId(device_uuid(int(checked("cuDeviceGet", ordinal))))


def free_bytes(device: DeviceId) -> int:
    """Bytes of a GPU's memory that are free, as NVML tells.

    Raises:
        DeviceNotFound: NVML knows no such device.
        DriverUnavailable: NVML or its bindings are missing, or cannot tell.
    """
    nvml = _nvml(os.getpid())
    try:
        return int(nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByUUID(device)).free)
    except nvml.NVMLError_NotFound as error:
        raise DeviceNotFound(f"NVML knows no device {device}", hint="nvidia-smi -L lists the devices.") from error
    except nvml.NVMLError as error:
        raise DriverUnavailable(f"NVML cannot tell the free memory of {device}: {error}") from error


@functools.cache
def _nvml(process: int) -> Any:  # noqa: ARG001 - a forked child must initialise NVML anew
    try:
        import pynvml
    except ImportError as error:
        raise DriverUnavailable(
            f"the Python bindings of NVML cannot be imported: {error}", hint="Install them with: pip install 'gms[cuda]'"
        ) from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise DriverUnavailable(
            f"NVML cannot be initialised: {error}", hint="Install the NVIDIA driver; nvidia-smi -L must list the GPUs."
        ) from error
    return pynvml


def _handles(nvml: Any) -> Iterator[Any]:
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        if not _mig_is_on(nvml, handle):
            yield handle
            continue
        for place in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
            try:
                yield nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, place)
            except nvml.NVMLError_NotFound:  # no instance in this place
                continue


def _mig_is_on(nvml: Any, handle: Any) -> bool:
    try:
        current, _ = nvml.nvmlDeviceGetMigMode(handle)
    except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound, nvml.NVMLError_InvalidArgument):
        return False
    return bool(current == nvml.NVML_DEVICE_MIG_ENABLE)
