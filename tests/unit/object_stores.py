"""Object stores in tests: a server that speaks S3 on loopback, a proxy before it that does harm, and snapshots without a server of GMS."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import xxhash

from gms_core.layout import Allocation, layout_digest
from gms_core.snapshot.manifest import BLOCK_BYTES, Device, Image
from gms_core.snapshot.objects.bucket import Bucket
from gms_core.snapshot.objects.root import open_root
from gms_core.snapshot.objects.staging import ObjectStaging
from gms_core.snapshot.on_disk import image_folder
from gms_core.snapshot.plan import lay_out, pieces
from gms_core.snapshot.shelves import Objects
from tests.unit.publishing import MODEL, PAGE

SECRET = "wJalrXUtnFEMIsecretKEY"
KEY = "AKIAIOSFODNN7KEY"
SERVE = """
import logging, os, signal, sys, threading
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

logging.getLogger("werkzeug").setLevel(logging.ERROR)
store, alone = DomainDispatcherApplication(create_backend_app), threading.Lock()


def one_by_one(environment, begin):  # it asks whether there is an object, and then makes it
    if "HTTP_IF_NONE_MATCH" not in environment:
        return store(environment, begin)
    with alone:
        return list(store(environment, begin))


server = make_server("127.0.0.1", 0, one_by_one, threaded=True)
print(server.port, flush=True)
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()  # whoever has started it is gone
server.serve_forever()
"""


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """A process that speaks S3; yields its endpoint."""
    process = subprocess.Popen([sys.executable, "-c", SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


def make_bucket(endpoint: str, name: str) -> None:
    connection = http.client.HTTPConnection(endpoint.removeprefix("http://"), timeout=60)
    try:
        connection.request("PUT", f"/{name}")
        assert connection.getresponse().status == 200
    finally:
        connection.close()


def forget_frames(error: BaseException) -> None:
    """Have an error that is kept keep no frames, and with them no connections."""
    left: BaseException | None = error
    while left is not None:
        left.__traceback__ = None
        left = left.__cause__ or left.__context__


class Request(NamedTuple):
    """A request that the proxy was sent."""

    method: str
    path: str
    headers: dict[str, str]

    @property
    def key(self) -> str:
        return self.path.partition("?")[0]


@dataclass
class Harm:
    """What the proxy does to some requests.

    Attributes:
        method: Of the requests.
        path: A regular expression that is found in their paths.
        times: How often.
        status: Is answered in place of the store's answer.
        word: The store's word for the error.
        cut: The connection is closed after so many bytes of the answer's body.
        change: Makes another body of the answer's.
        drop_headers: Of the request.
        lose_answer: The store does what was asked, and nobody hears of it.
        call: Is called before the request goes on.
    """

    method: str
    path: str
    times: int = 1
    status: int = 0
    word: str = "SlowDown"
    cut: int | None = None
    change: Callable[[bytes], bytes] | None = None
    drop_headers: tuple[str, ...] = ()
    lose_answer: bool = False
    call: Callable[[], None] | None = None


@dataclass
class Proxy:
    """A proxy before the S3 server.

    Attributes:
        endpoint: Where it listens.
        bucket: The test's own.
        harm: What it does next; what is done is not done again.
        seen: The requests.
    """

    endpoint: str = ""
    bucket: str = ""
    harm: list[Harm] = field(default_factory=list)
    seen: list[Request] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        """Of a root in the bucket."""
        return f"s3://{self.bucket}/some/prefix"

    def take(self, request: Request) -> Harm | None:
        with self.lock:
            self.seen.append(request)
            for one in self.harm:
                if one.times > 0 and one.method == request.method and re.search(one.path, request.path):
                    one.times -= 1
                    return one
        return None


@contextlib.contextmanager
def proxy_before(endpoint: str) -> Iterator[Proxy]:
    """A proxy that does no harm yet."""
    proxy = Proxy()
    host = endpoint.removeprefix("http://")

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def forward(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(length)
            if len(body) < length:  # whoever asked has given up
                self.close_connection = True
                return
            request = Request(self.command, self.path, {name.lower(): value for name, value in self.headers.items()})
            harm = proxy.take(request) or Harm("", "")
            if harm.call is not None:
                harm.call()
            if harm.status:
                self.answer(harm.status, {}, f"<Error><Code>{harm.word}</Code><Message>{SECRET} {KEY}</Message></Error>".encode())
                return
            connection = http.client.HTTPConnection(host, timeout=60)
            try:
                headers = {name: value for name, value in self.headers.items() if name.lower() not in harm.drop_headers}
                connection.request(self.command, self.path, body, headers)
                answer = connection.getresponse()
                data = answer.read()
            finally:
                connection.close()
            if harm.lose_answer:
                self.close_connection = True
                return
            if harm.change is not None:
                data = harm.change(data)
            found = {name: value for name, value in answer.getheaders() if name.lower() not in ("connection", "transfer-encoding", "date", "server")}
            if self.command != "HEAD":
                found = {name: value for name, value in found.items() if name.lower() != "content-length"}
            self.answer(answer.status, found, data, harm.cut)

        def answer(self, status: int, headers: dict[str, str], data: bytes, cut: int | None = None) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if self.command != "HEAD":
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data if cut is None else data[:cut])
            if cut is not None:
                self.close_connection = True

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            pass  # whoever asked is gone

    server = Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    proxy.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, name="test-proxy")
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def sockets() -> set[str]:
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.add(os.readlink(f"/proc/self/fd/{number}"))
    return {one for one in found if one.startswith("socket:")}


@contextlib.contextmanager
def no_connections_left() -> Iterator[None]:
    """Wait until the library has closed what it keeps open for further requests: it does so behind its own back."""
    before = sockets()
    yield
    deadline = time.monotonic() + 30
    while left := sockets() - before:
        assert time.monotonic() < deadline, f"connections left open: {left}"
        time.sleep(0.01)


def objects_in(bucket: Bucket) -> Objects:
    """A shelf in a bucket."""
    return Objects(open_root(bucket, create=True))


def put_image(bucket: Bucket, target, index: int = 0, first: bytes = b"x" * PAGE, size: int = 3 * PAGE) -> Image:
    """Put an image that is zero behind its first bytes, as if it had been saved."""
    shards, stripes = lay_out(size, image_folder(index), target.places, stripe_bytes=target.plan.stripe_bytes, shard_bytes=target.plan.shard_bytes)
    data = first + bytes(size - len(first))
    plan = target.plan
    for shard in shards:
        bucket.write(f"{plan.name}/{plan.version}/{shard.path}", data)
    checksums = tuple(xxhash.xxh3_64_hexdigest(data[piece.offset : piece.offset + piece.size]) for piece in pieces(stripes))
    digest = layout_digest(MODEL, [Allocation(0, 0, size)], b"tensors")
    device = Device("host", "host", PAGE)
    return Image("weights", 1, device, dict(MODEL.fields), digest, ((0, size),), b"tensors", shards, stripes, BLOCK_BYTES, checksums)


def save_objects(shelf: Objects, name: str = "model", first: bytes = b"x" * PAGE):
    """A snapshot of one small image, without a server."""
    with ObjectStaging.begin(shelf.root, name, stripe_bytes=BLOCK_BYTES, shard_bytes=BLOCK_BYTES) as staging:
        return staging.commit([put_image(shelf.root.bucket, staging.target, first=first)])


def holds(shelf: Objects, wanted: str = "model") -> bytes:
    """The first byte of a snapshot whose objects are all there, with the sizes that they should have."""
    bucket = shelf.root.bucket
    with shelf.find(wanted) as snapshot:
        files = snapshot.files(0)
        return bucket.read(str(files[0].path).removeprefix(f"{bucket.url}/"))[:1]


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
