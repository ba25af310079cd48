"""Memory drivers: physical memory apart from virtual addresses. See `gms_core.vmm.driver` for what a driver promises."""

from __future__ import annotations

from gms_core.devices import HOST, DeviceId
from gms_core.errors import DeviceNotFound
from gms_core.vmm.driver import Driver, PhysicalDriver


def open_driver(device: DeviceId) -> Driver:
    """Open the driver of a device, for a process that maps memory.

    Raises:
        DeviceNotFound: No such device, or this process cannot see it.
        DriverUnavailable: The driver, its bindings or a capability is missing; the hint says how to get it.
    """
    return _open(device, None)


def open_physical_driver(device: DeviceId, capacity: int | None = None) -> PhysicalDriver:
    """Open the half of the driver that a server needs.

    Args:
        device: Which device.
        capacity: Bytes that the ``host`` device offers, None for all that the machine has. A GPU offers all it has, whatever is said here.

    Raises:
        DeviceNotFound: No such device, or this process cannot see it.
        DriverUnavailable: The driver, its bindings or a capability is missing; the hint says how to get it.
    """
    return _open(device, capacity)


def _open(device: DeviceId, capacity: int | None) -> Driver:
    # Each driver is imported when it is opened: a machine without a GPU has no CUDA bindings.
    if device == HOST:
        from gms_core.vmm.host import HostDriver

        return HostDriver(capacity)
    if device.startswith(("GPU-", "MIG-")):
        from gms_core.vmm.cuda import CudaDriver

        return CudaDriver(device)
    raise DeviceNotFound(f"{device!r} names no device", hint="A device is 'host' or the UUID of a GPU, as nvidia-smi -L lists it.")
