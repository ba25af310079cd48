"""What the API server of Kubernetes answers about Leases, as its published reference and its own clients' use of it have it: versions that grow with
each change, changes that are refused if they are of an older one, and the errors of a Status. No API server can be had where the tests run."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_LEASES = re.compile(r"/apis/coordination\.k8s\.io/v1/namespaces/([^/?]+)/leases(?:/([^/?]+))?")
_MICRO_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{1,9}(Z|[+-]\d\d:\d\d)")
_REASONS = {400: "BadRequest", 403: "Forbidden", 404: "NotFound", 409: "Conflict", 500: "InternalError"}


class KubernetesApi:
    """The Leases of one cluster.

    Attributes:
        leases: By namespace and name.
        refuse: A status with which everything is refused; 0 for none.
        hangs: Requests wait while it is set.
    """

    def __init__(self) -> None:
        self.leases: dict[tuple[str, str], dict[str, Any]] = {}
        self.refuse = 0
        self.hangs = threading.Event()
        self._version = 100
        self._guard = threading.Lock()

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        while self.hangs.is_set():
            time.sleep(0.01)
        if self.refuse:
            return self._error(self.refuse)
        found = _LEASES.fullmatch(path.partition("?")[0])
        if found is None:
            return self._error(404)
        namespace, name = found.groups()
        with self._guard:
            if method == "POST" and name is None:
                return self._create(namespace, body)
            lease = self.leases.get((namespace, name))
            if lease is None:
                return self._error(404)
            return (200, lease) if method == "GET" else self._replace(namespace, name, lease, body)

    def _create(self, namespace: str, body: Any) -> tuple[int, Any]:
        if (namespace, body["metadata"]["name"]) in self.leases:
            return self._error(409)
        return self._store(namespace, body["metadata"]["name"], body, 201)

    def _replace(self, namespace: str, name: str, lease: Any, body: Any) -> tuple[int, Any]:
        version = body["metadata"].get("resourceVersion")
        if version is not None and version != lease["metadata"]["resourceVersion"]:
            return self._error(409)
        return self._store(namespace, name, body, 200)

    def _store(self, namespace: str, name: str, body: Any, status: int) -> tuple[int, Any]:
        spec = body["spec"]
        for field in ("acquireTime", "renewTime"):
            if field in spec and _MICRO_TIME.fullmatch(spec[field]) is None:
                return self._error(400)
        for field in ("leaseDurationSeconds", "leaseTransitions"):
            if not isinstance(spec.get(field, 0), int) or spec.get(field, 0) < 0:
                return self._error(400)
        self._version += 1
        metadata = {**body["metadata"], "namespace": namespace, "name": name, "resourceVersion": str(self._version)}
        lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}
        self.leases[namespace, name] = lease
        return status, lease

    @staticmethod
    def _error(status: int) -> tuple[int, Any]:
        reason = _REASONS.get(status, "Unknown")
        return status, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "message": reason, "code": status}


@contextmanager
def kubernetes_api(directory: Path) -> Iterator[tuple[KubernetesApi, Path]]:
    """An API server, and the file that says where it is."""
    api = KubernetesApi()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _do(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            status, answer = api.answer(self.command, self.path, body)
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = _do

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = False  # so that `server_close` waits for them

        def process_request(self, request: Any, client_address: Any) -> None:
            connections.append(request)
            super().process_request(request, client_address)

    connections: list[socket.socket] = []
    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    file = directory / "kubeconfig"
    address = f"http://127.0.0.1:{server.server_address[1]}"
    file.write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "here",
                "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me", "namespace": "serving"}}],
                "clusters": [{"name": "here", "cluster": {"server": address}}],
                "users": [{"name": "me", "user": {}}],
            }
        )
    )
    try:
        yield api, file
    finally:
        api.hangs.clear()
        server.shutdown()
        thread.join()
        for connection in connections:
            with suppress(OSError):  # closed already
                connection.shutdown(socket.SHUT_RDWR)
        server.server_close()
