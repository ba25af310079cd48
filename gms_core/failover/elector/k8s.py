"""Locks in Kubernetes: a Lease of its API, used as its own components use it. The only module that knows its client (kubernetes).

The API server does not let a Lease run out: each candidate sees for itself, by its own clock, that it was not changed for as long as it was to last.
A change is refused if the Lease is not what it was when it was read.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TypeVar

import urllib3.exceptions
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException, OpenApiException

from gms_core.errors import ConfigurationError, LockStoreUnavailable, PermissionRefused
from gms_core.failover.elector.address import K8sAddress
from gms_core.failover.elector.store import Candidate, Owned, Taken
from gms_core.failover.elector.validity import answer_s

_NAMESPACE_OF_POD = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"
_HINT = "The account needs get, create and update of leases in coordination.k8s.io; see docs/failover.md."

Answer = TypeVar("Answer")


class K8sStore:
    """A Lease; see `gms_core.failover.elector.store.LockStore`. The term is the number of its transitions, and one."""

    look_s = 0.5

    def __init__(self, address: K8sAddress, candidate: Candidate, clock: Callable[[], float]) -> None:
        """Find the API server: that of this process's pod, or that of the current context.

        Args:
            address: Of the Lease.
            candidate: Who wants it.
            clock: Seconds of a clock that nobody sets.

        Raises:
            ConfigurationError: There is neither.
        """
        self._name, self._identity = address.name, f"{candidate} {candidate.token}"
        self._ttl_s, self._timeout_s = math.ceil(address.ttl_s), answer_s(address.ttl_s)
        self._clock = clock
        self._api, namespace = _connect()
        self._namespace = address.namespace or namespace
        self._seen: tuple[str, float] = ("", 0.0)

    def take(self) -> Taken | Owned:
        """As `LockStore.take`."""
        lease = self._read()
        if lease is None:
            metadata = client.V1ObjectMeta(name=self._name, namespace=self._namespace)
            made = client.V1Lease(metadata=metadata, spec=self._spec(transitions=0))
            lease = self._ask(lambda: self._api.create_namespaced_lease(self._namespace, made, _request_timeout=self._timeout_s), missing=(409,))
            return Owned("somebody else, who was faster,") if lease is None else Taken(_transitions(lease) + 1)
        owner = lease.spec.holder_identity or ""
        if owner == self._identity:
            return Taken(_transitions(lease) + 1) if self.renew() else Owned("this engine, by an answer that came too late,")
        if owner and not self._has_run_out(lease):
            return Owned(owner.rpartition(" ")[0] or owner)
        lease.spec = self._spec(transitions=_transitions(lease) + 1)
        return Taken(_transitions(lease) + 1) if self._write(lease) else Owned("somebody else, who was faster,")

    def renew(self) -> bool:
        """As `LockStore.renew`."""
        while (lease := self._read()) is not None and lease.spec.holder_identity == self._identity:
            lease.spec.renew_time = _now()
            if self._write(lease):
                return True
        return False

    def release(self) -> None:
        """As `LockStore.release`."""
        while (lease := self._read()) is not None and lease.spec.holder_identity == self._identity:
            lease.spec.holder_identity = ""
            if self._write(lease):
                return

    def close(self) -> None:
        """As `LockStore.close`."""
        self._api.api_client.close()

    def _spec(self, transitions: int) -> Any:
        at = _now()
        return client.V1LeaseSpec(
            holder_identity=self._identity, lease_duration_seconds=self._ttl_s, acquire_time=at, renew_time=at, lease_transitions=transitions
        )

    def _has_run_out(self, lease: Any) -> bool:
        """Whether this process has seen it unchanged for as long as it was to last."""
        version = str(lease.metadata.resource_version)
        if self._seen[0] != version:
            self._seen = (version, self._clock())
        return self._clock() - self._seen[1] > (lease.spec.lease_duration_seconds or self._ttl_s)

    def _read(self) -> Any:
        """The Lease, or None if there is none."""
        return self._ask(lambda: self._api.read_namespaced_lease(self._name, self._namespace, _request_timeout=self._timeout_s), missing=(404,))

    def _write(self, lease: Any) -> bool:
        """Change it as it was read; returns whether it was still that."""
        changed = self._ask(
            lambda: self._api.replace_namespaced_lease(self._name, self._namespace, lease, _request_timeout=self._timeout_s), missing=(404, 409)
        )
        return changed is not None

    def _ask(self, question: Callable[[], Answer], *, missing: tuple[int, ...]) -> Answer | None:
        """Ask the API server; None if its answer has one of these codes."""
        try:
            return question()
        except ApiException as error:
            if error.status in missing:
                return None
            words = f"Kubernetes answers {error.status} {error.reason} for the Lease {self._namespace}/{self._name}"
            if error.status in (401, 403):
                raise PermissionRefused(words, hint=_HINT) from error
            if error.status in (400, 404, 422):
                raise ConfigurationError(words, hint="Is there such a namespace?") from error
            raise LockStoreUnavailable(words) from error
        except (OpenApiException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            raise LockStoreUnavailable(f"Kubernetes does not answer: {type(error).__name__}: {str(error)[:200]}") from error


def _connect() -> tuple[Any, str]:
    """The API, and the namespace of this process."""
    options = client.Configuration()
    try:
        config.load_incluster_config(client_configuration=options)
    except config.ConfigException:
        try:
            config.load_kube_config(client_configuration=options)
            _, context = config.list_kube_config_contexts()
        except (config.ConfigException, OSError, ValueError) as error:
            raise ConfigurationError(
                f"no API server of Kubernetes is known: {error}", hint="Run in a pod with a service account, or set KUBECONFIG."
            ) from error
        namespace = (context or {}).get("context", {}).get("namespace") or "default"
    else:
        with open(_NAMESPACE_OF_POD, encoding="utf-8") as file:
            namespace = file.read().strip()
    options.retries = urllib3.Retry(0, redirect=0)  # what is not answered in time is asked again, by the elector
    return client.CoordinationV1Api(client.ApiClient(options)), namespace


def _transitions(lease: Any) -> int:
    return int(lease.spec.lease_transitions or 0)


def _now() -> datetime:
    """For people only: nobody compares it. A fraction of a second has to be there."""
    now = datetime.fromtimestamp(time.time(), UTC)
    return now.replace(microsecond=now.microsecond or 1)
