"""Which of this machine's networks UCX uses: by itself it would use, and listen at, every one that it finds."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import socket
from pathlib import Path

from gms_core.config import ucx_devices
from gms_core.errors import InvalidArgument

_GET_ADDRESS = 0x8915
"""``SIOCGIFADDR``."""
_INTERFACES = Path("/sys/class/net")


def keep_to(address: str) -> str:
    """Have UCX use the network of an address of this machine alone, unless the environment names others. Before NIXL makes an agent.

    Args:
        address: Such as the one that a connection has here.

    Returns:
        What UCX is told to use.

    Raises:
        InvalidArgument: The address is of no network, or of all of them.
    """
    return ucx_devices(lambda: _devices_of(address))


def _devices_of(address: str) -> str:
    interface = interface_of(address)
    if not interface:
        raise InvalidArgument(
            f"{address} does not say which network the weights may go over",
            hint="Use an address of one network, or name UCX's devices with UCX_NET_DEVICES: whoever reaches them reaches this process's memory.",
        )
    return ",".join([interface, *_rdma_of(interface)])


def interface_of(address: str) -> str:
    """The network interface that has an address; empty if none, or more than one, has it."""
    wanted = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(wanted, ipaddress.IPv6Address) and wanted.ipv4_mapped is not None:
        wanted = wanted.ipv4_mapped
    if isinstance(wanted, ipaddress.IPv6Address):
        lines = Path("/proc/net/if_inet6").read_text().splitlines() if Path("/proc/net/if_inet6").exists() else []
        found = [words[5] for line in lines if int((words := line.split())[0], 16) == int(wanted)]
    else:
        found = [name for _, name in socket.if_nameindex() if _has(name, wanted)]
    return found[0] if len(found) == 1 else ""


def _has(interface: str, address: ipaddress.IPv4Address) -> bool:
    """Whether an interface has an address. All of 127.0.0.0/8 is the one that has 127.0.0.1."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked, contextlib.suppress(OSError):
        answer = fcntl.ioctl(asked, _GET_ADDRESS, interface.encode().ljust(40, b"\0"))
        found = ipaddress.IPv4Address(answer[20:24])
        return found == address or (found.is_loopback and address.is_loopback)
    return False


def _rdma_of(interface: str) -> list[str]:
    """What UCX calls the RDMA devices on the same card as an interface."""
    folder = _INTERFACES / interface / "device" / "infiniband"
    return [f"{device.name}:{port.name}" for device in sorted(folder.glob("*")) for port in sorted((device / "ports").glob("*"))]
