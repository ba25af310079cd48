"""Which lock in which store a configuration names."""

from __future__ import annotations

import math
import re
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_K8S_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?")

ETCD_FORM = "etcd://HOST:PORT[,HOST:PORT...]/NAME[?ttl_s=SECONDS][&cacert=FILE][&cert=FILE&key=FILE]"
K8S_FORM = "k8s:[NAMESPACE/]NAME[?ttl_s=SECONDS]"

SHORTEST_TTL_S = 3.0
LONGEST_TTL_S = 300.0
DEFAULT_TTL_S = 10.0


@dataclass(frozen=True, slots=True)
class EtcdAddress:
    """A lock in etcd.

    Attributes:
        endpoints: Hosts and ports of its members. Any of them is asked.
        name: The lock's.
        ttl_s: Seconds after the last renewal at which the lock is anybody's.
        cacert: File of the certificates that are trusted; None for those of the system. With any of the three, etcd is spoken to by TLS.
        cert: File of this client's certificate.
        key: File of the key to that.
    """

    endpoints: tuple[tuple[str, int], ...]
    name: str
    ttl_s: float = DEFAULT_TTL_S
    cacert: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    @property
    def is_encrypted(self) -> bool:
        """Whether etcd is spoken to by TLS."""
        return self.cacert is not None or self.cert is not None


@dataclass(frozen=True, slots=True)
class K8sAddress:
    """A Lease of Kubernetes.

    Attributes:
        namespace: Where it is; empty for that of this process's pod, or of the current context.
        name: The Lease's.
        ttl_s: Seconds after the last renewal at which the lock is anybody's.
    """

    namespace: str
    name: str
    ttl_s: float = DEFAULT_TTL_S


StoreAddress = EtcdAddress | K8sAddress


def parse(text: str) -> StoreAddress:
    """What a configuration names.

    Args:
        text: In one of the forms `ETCD_FORM` and `K8S_FORM`.

    Raises:
        ValueError: It is in neither; says what is wrong.
    """
    kind, _, where = text.partition(":")
    where, _, query = where.partition("?")
    options = _options(query)
    if kind == "etcd":
        address: StoreAddress = _etcd(where, options)
    elif kind == "k8s":
        address = _k8s(where, options)
    else:
        raise ValueError(f"must be {ETCD_FORM} or {K8S_FORM}")
    if options:
        raise ValueError(f"{next(iter(options))} is no option of {kind}: locks")
    return address


def _options(query: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for name, value in urllib.parse.parse_qsl(query, keep_blank_values=True):
        if name in options:
            raise ValueError(f"{name} is given twice")
        options[name] = value
    return options


def _etcd(where: str, options: dict[str, str]) -> EtcdAddress:
    if not where.startswith("//"):
        raise ValueError(f"must be {ETCD_FORM}")
    hosts, _, name = where[2:].partition("/")
    if _NAME.fullmatch(name) is None:
        raise ValueError("the lock's name must be 1 to 64 letters, digits, '_', '.' or '-', and begin with a letter or a digit")
    cert, key = _file(options, "cert"), _file(options, "key")
    if (cert is None) != (key is None):
        raise ValueError("cert and key go together")
    endpoints = tuple(_endpoint(host) for host in hosts.split(","))
    return EtcdAddress(endpoints, name, _ttl(options), _file(options, "cacert"), cert, key)


def _endpoint(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"{text!r} is not HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _k8s(where: str, options: dict[str, str]) -> K8sAddress:
    namespace, slash, name = where.rpartition("/")
    if _K8S_NAME.fullmatch(name) is None or (slash and _K8S_NAME.fullmatch(namespace) is None):
        raise ValueError(f"must be {K8S_FORM}, with names of lower-case letters, digits, '-' and '.'")
    return K8sAddress(namespace, name, _ttl(options))


def _ttl(options: dict[str, str]) -> float:
    text = options.pop("ttl_s", None)
    if text is None:
        return DEFAULT_TTL_S
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not SHORTEST_TTL_S <= seconds <= LONGEST_TTL_S:
        raise ValueError(f"ttl_s must be {SHORTEST_TTL_S:g} to {LONGEST_TTL_S:g} seconds")
    return seconds


def _file(options: dict[str, str], name: str) -> Path | None:
    text = options.pop(name, None)
    if text is None:
        return None
    if not text.startswith("/") or "\0" in text:
        raise ValueError(f"{name} must be an absolute path")
    return Path(text)


def files(address: StoreAddress) -> Mapping[str, Path]:
    """The files that an address names, by the names of their options."""
    if isinstance(address, K8sAddress):
        return {}
    named = {"cacert": address.cacert, "cert": address.cert, "key": address.key}
    return {name: path for name, path in named.items() if path is not None}
