"""Locks in etcd: a key that lives as long as a lease of etcd's which is kept alive. The only module that knows its client (etcd3gw)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
import requests
from etcd3gw.client import Etcd3Client
from etcd3gw.exceptions import Etcd3Exception
from etcd3gw.lease import Lease

from gms_core.errors import GmsError, LockStoreUnavailable, PermissionRefused
from gms_core.failover.elector.address import EtcdAddress
from gms_core.failover.elector.store import Candidate, Owned, Taken
from gms_core.failover.elector.validity import answer_s

PREFIX = "/gms/locks/"
"""Of the keys, each with the lock's name at its end."""
_API = "/v3/"
"""Where etcd 3.4 and later answer."""
_REFUSALS = ("user name is empty", "permission denied", "invalid auth token", "authentication failed")
_NOT_FOUND = "requested lease not found"

Answer = TypeVar("Answer")


class EtcdStore:
    """A lock in etcd; see `gms_core.failover.elector.store.LockStore`. The term is the revision at which the key was made."""

    look_s = 0.1

    def __init__(self, address: EtcdAddress, candidate: Candidate) -> None:
        self._key = PREFIX + address.name
        self._candidate = candidate
        self._ttl_s = math.ceil(address.ttl_s)
        self._clients = [_client(address, host, port) for host, port in address.endpoints]
        self._lease_id = 0
        self._term = 0

    def take(self) -> Taken | Owned:
        """As `LockStore.take`."""
        return self._ask(self._take)

    def renew(self) -> bool:
        """As `LockStore.renew`. A key that was deleted by hand is not ours any more, though the lease lives."""
        return self._ask(self._renew)

    def release(self) -> None:
        """As `LockStore.release`."""
        if self._lease_id:
            self._ask(lambda client: _revoke(client, self._lease_id))

    def close(self) -> None:
        """As `LockStore.close`."""
        for client in self._clients:
            client.session.close()

    def _take(self, client: Etcd3Client) -> Taken | Owned:
        found = client.get(self._key, metadata=True)
        if not found:
            lease = client.lease(self._ttl_s)
            if not client.create(self._key, msgspec.json.encode(self._candidate), lease):
                _revoke(client, lease.id)
            found = client.get(self._key, metadata=True)
        return self._found(client, *found[0]) if found else Owned("nobody, but for a moment somebody had it,")

    def _found(self, client: Etcd3Client, value: bytes, about: Any) -> Taken | Owned:
        try:
            owner = msgspec.json.decode(value, type=Candidate)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return Owned(f"whatever has written {self._key}, which is no engine,")
        if owner.token != self._candidate.token:
            return Owned(str(owner))
        self._lease_id, self._term = int(about["lease"]), int(about["create_revision"])
        return Taken(self._term) if self._renew(client) else Owned("this engine, by an answer that came too late,")

    def _renew(self, client: Etcd3Client) -> bool:
        if Lease(self._lease_id, client).refresh() <= 0:
            return False
        found: Any = client.get(self._key, metadata=True)
        return bool(found) and int(found[0][1]["create_revision"]) == self._term

    def _ask(self, question: Callable[[Etcd3Client], Answer]) -> Answer:
        """Ask the member that answered last, then the others.

        Raises:
            PermissionRefused: One does not let this client in.
            LockStoreUnavailable: None answers.
        """
        reasons = []
        for client in list(self._clients):
            try:
                answer = question(client)
            except (Etcd3Exception, requests.RequestException, LookupError, TypeError, ValueError) as error:
                words = _words(error)
                if (refusal := _refusal(words)) is not None:
                    raise refusal from error
                reasons.append(f"{client.host}:{client.port}: {words}")
                continue
            self._clients.remove(client)
            self._clients.insert(0, client)
            return answer
        raise LockStoreUnavailable(f"etcd does not answer: {'; '.join(reasons)}")


def _client(address: EtcdAddress, host: str, port: int) -> Etcd3Client:
    return Etcd3Client(
        host,
        port,
        "https" if address.is_encrypted else "http",
        ca_cert=None if address.cacert is None else str(address.cacert),
        cert_cert=None if address.cert is None else str(address.cert),
        cert_key=None if address.key is None else str(address.key),
        timeout=answer_s(address.ttl_s),
        api_path=_API,
    )


def _revoke(client: Etcd3Client, lease_id: int) -> None:
    try:
        Lease(lease_id, client).revoke()
    except Etcd3Exception as error:
        if _NOT_FOUND not in _words(error):
            raise


def _refusal(words: str) -> GmsError | None:
    if any(refusal in words for refusal in _REFUSALS):
        return PermissionRefused(f"etcd does not let this client in: {words}", hint=f"Name a certificate of a user who may write {PREFIX}.")
    return None


def _words(error: Exception) -> str:
    """The first line of what an error says."""
    said = (getattr(error, "detail_text", None) or str(error)).strip()
    return said.splitlines()[0][:200] if said else type(error).__name__
