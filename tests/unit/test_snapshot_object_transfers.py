"""The backend ``object``: bytes between memory and objects, through a server that speaks S3 and a proxy that does harm."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import threading
import time
import traceback
from dataclasses import replace

import pytest

from gms_core.errors import (
    BackendUnavailable,
    ConfigurationError,
    GmsError,
    InvalidArgument,
    PermissionRefused,
    SnapshotDamaged,
    SnapshotNotFound,
    TransferCancelled,
    TransferFailed,
)
from gms_core.snapshot import registry
from gms_core.snapshot.manifest import PAGE_BYTES
from gms_core.snapshot.memories import memory_for
from gms_core.snapshot.objects.bucket import Bucket, timeout_s
from gms_core.snapshot.objects.refusals import refusal
from gms_core.snapshot.objects.urls import MOST_PARTS
from gms_core.snapshot.running import check
from gms_core.snapshot.shelves import open_shelf
from gms_core.snapshot.transfer import File
from tests.unit.object_stores import KEY, SECRET, Harm, forget_frames, save_objects
from tests.unit.publishing import until
from tests.unit.snapshot_transfers import LateMemory, Scene, rings, transfer_threads

MIB = 2**20
LARGE = ((0, 20 * MIB), (21 * MIB, 3 * MIB), (30 * MIB, 5 * PAGE_BYTES))
"""Parts of uploads have 5 MiB at least: two objects, of which one has two."""


class ObjectScene(Scene):
    """A scene whose files are objects, in two roots' folders."""

    def __init__(self, folder, bucket, **shape):
        super().__init__(folder, **shape)
        self.bucket = bucket
        self.keys = [f"{number}.shard" for number in range(len(self.files))]
        self.files = [File(bucket.url_of(key), file.root, file.size) for key, file in zip(self.keys, self.files, strict=True)]

    def expected(self):
        found = [bytearray(file.size) for file in self.files]
        for stripe in self.stripes:
            found[stripe.shard][stripe.position : stripe.position + stripe.size] = self.data[stripe.offset : stripe.offset + stripe.size]
        return found

    def fill_files(self):
        for key, data in zip(self.keys, self.expected(), strict=True):
            self.bucket.write(key, bytes(data))

    def files_hold_image(self):
        return [self.bucket.read(key) for key in self.keys] == self.expected()

    def job(self, direction="restore", workers=0, **options):
        return replace(super().job(direction, workers, **options), objects=True, options=options)

    def save(self, name="object", memory_of=None, **options):
        return super().save(name, memory_of, **options)

    def restore(self, name="object", memory_of=None, **options):
        return super().restore(name, memory_of, **options)


@pytest.fixture
def small(tmp_path):
    """In files, with parts of two pages."""
    (tmp_path / "objects").mkdir()
    return ObjectScene(tmp_path, Bucket(f"file://{tmp_path}/objects"))


@pytest.fixture
def large(tmp_path, s3):
    scene = ObjectScene(tmp_path, Bucket(s3.url), allocations=LARGE, block_pages=2048, stripe_blocks=1)
    yield scene
    del scene.bucket  # and its connections


@pytest.fixture
def few_retries(monkeypatch):
    monkeypatch.setattr("gms_core.snapshot.objects.bucket.RETRIES", 2)


def failed(kind, match, work):
    """The error of a transfer that leaves nothing under way, and whose words hold no secret."""
    before = rings()
    with pytest.raises(kind, match=match) as raised:
        work()
    until(lambda: not transfer_threads())
    assert rings() == before
    told = "".join(traceback.format_exception(raised.value)) + str(vars(raised.value))
    assert not re.search(f"{SECRET}|{KEY}|Signature|<Error>", told)
    forget_frames(raised.value)
    return raised.value


@pytest.mark.parametrize("memory_of", [memory_for, LateMemory], ids=["memory", "late copies"])
@pytest.mark.parametrize("options", [{}, {"workers": 1, "depth": "1", "buffers": "1"}, {"workers": 3, "depth": "3", "buffers": "4"}])
def test_bytes_come_back_when_they_were_saved(small, memory_of, options):
    saved = small.save(memory_of=memory_of, chunk_bytes=str(2 * PAGE_BYTES), **options)
    assert saved.bytes == small.size
    assert [saved.checksums[number] for number in range(len(small.checksums))] == small.checksums
    assert small.files_hold_image()
    memory, moved = small.restore(memory_of=memory_of, chunk_bytes=str(PAGE_BYTES), **options)
    assert (moved.bytes, small.holds(memory)) == (small.size, True)


def test_objects_are_uploaded_in_parts_at_once_when_they_are_large(large, s3):
    delays = [Harm("PUT", "partNumber=1&", call=lambda: time.sleep(0.2)), Harm("PUT", "partNumber=2&", call=lambda: time.sleep(0.1))]
    s3.harm += delays  # a buffer that was used again too early would be sent with other bytes
    assert large.save(chunk_bytes=str(8 * MIB), depth="2").bytes == large.size
    assert large.files_hold_image()
    parts = [request for request in s3.seen if request.method == "PUT" and re.search(r"0\.shard.*partNumber=", request.path)]
    assert len(parts) == 2
    memory, _ = large.restore()
    assert large.holds(memory)
    ranges = [request.headers["range"] for request in s3.seen if request.method == "GET" and "range" in request.headers]
    assert len(ranges) == 3, "a request for each 8 MiB of an object"


def test_transfer_goes_on_when_the_store_fails_for_a_while(large, s3):
    s3.harm += [
        Harm("PUT", "partNumber=", status=503),
        Harm("PUT", "partNumber=", lose_answer=True),
        Harm("POST", "uploads", status=500, word="InternalError"),
        Harm("POST", r"0\.shard.*uploadId=", lose_answer=True),
        Harm("POST", r"0\.shard.*uploadId=", status=404, word="NoSuchUpload"),  # what a store may answer when that is sent again
        Harm("GET", r"0\.shard", cut=3 * MIB),
        Harm("GET", r"0\.shard", cut=100),
        Harm("GET", r"1\.shard", status=503),
    ]
    large.save()
    assert large.files_hold_image()
    memory, _ = large.restore()
    assert large.holds(memory)
    assert all(one.times == 0 for one in s3.harm), "all of it was done"


@pytest.mark.parametrize(
    ("harm", "kind", "match"),
    [
        ({"status": 503}, TransferFailed, r"read at position [0-9]+: the store has asked for patience too often \(503 SlowDown\)"),
        ({"status": 429, "word": "TooMany"}, TransferFailed, "asked for patience too often"),
        ({"status": 500, "word": "InternalError"}, TransferFailed, r"the store refuses \(500 InternalError\)"),
        ({"status": 403, "word": "AccessDenied"}, PermissionRefused, r"these credentials may not do that \(403 AccessDenied\)"),
        ({"status": 403, "word": "ExpiredToken"}, PermissionRefused, "the credentials are not valid, or not any more"),
        ({"status": 404, "word": "NoSuchKey"}, SnapshotNotFound, "is not there"),
        ({"status": 404, "word": "NoSuchBucket"}, SnapshotNotFound, "there is no bucket bucket-"),
        ({"status": 416, "word": "InvalidRange"}, SnapshotDamaged, "ends before, it must have"),
        ({"cut": 5000}, TransferFailed, "the connection to its store was cut, again and again"),
        ({"change": lambda data: data[:-1] + bytes([data[-1] ^ 4])}, SnapshotDamaged, r"is damaged: the [0-9]+ bytes at position"),
    ],
    ids=lambda value: ", ".join(map(str, value)) if isinstance(value, dict) else None,
)
def test_error_names_the_object_when_it_cannot_be_read(tmp_path, s3, few_retries, harm, kind, match):
    scene = ObjectScene(tmp_path, Bucket(s3.url))
    scene.fill_files()
    s3.harm.append(Harm("GET", r"1\.shard", times=10**6, **harm))
    error = failed(kind, match, lambda: scene.restore(workers=1))
    assert f"{s3.url}/1.shard" in error.message or "bucket" in error.message
    assert len([request for request in s3.seen if request.method == "GET" and "1.shard" in request.path]) <= 4, "retries are bounded"


@pytest.mark.parametrize(
    ("method", "path", "harm", "kind", "match"),
    [
        ("PUT", "partNumber=", {"status": 503}, TransferFailed, "written: the store has asked for patience too often"),
        ("PUT", "partNumber=", {"status": 403, "word": "AccessDenied"}, PermissionRefused, "written: these credentials may not do that"),
        ("PUT", "partNumber=", {"lose_answer": True}, TransferFailed, "written: the connection to its store was cut"),
        ("POST", "uploadId=", {"status": 500, "word": "InternalError"}, TransferFailed, r"written: the store refuses \(500 InternalError\)"),
        ("POST", "uploadId=", {"status": 404, "word": "NoSuchUpload"}, TransferFailed, "written: the store does not know its upload any more"),
        ("POST", "uploads", {"status": 404, "word": "NoSuchBucket"}, SnapshotNotFound, "written: there is no bucket"),
    ],
)
def test_upload_is_given_up_when_a_part_of_it_cannot_be_written(large, s3, few_retries, method, path, harm, kind, match):
    s3.harm.append(Harm(method, rf"0\.shard.*{path}", times=10**6, **harm))
    error = failed(kind, match, lambda: large.save(workers=1))
    assert f"{s3.url}/0.shard" in error.message
    begun = any(request.method == "POST" and "uploads" in request.path for request in s3.seen) and path != "uploads"
    assert any(request.method == "DELETE" and "uploadId=" in request.path for request in s3.seen) == begun, "the store is told to forget its parts"
    with pytest.raises(SnapshotNotFound):
        large.bucket.read("0.shard")


def test_nothing_is_left_when_a_transfer_is_cancelled(large, s3):
    large.fill_files()
    before = rings()
    with memory_for("host", large.allocations) as memory:
        transfer = registry.find("object").open(large.job(), memory)
        transfer.cancel()
        with pytest.raises(TransferCancelled):
            transfer.finish()
    until(lambda: not transfer_threads())
    assert rings() == before


def test_object_is_named_when_it_is_shorter_than_it_was(small):
    small.fill_files()
    small.bucket.write("1.shard", small.bucket.read("1.shard")[:-1])
    failed(SnapshotDamaged, rf"1\.shard ends at position {small.files[1].size - 1}, it must have {small.files[1].size} bytes", small.restore)


def test_store_is_named_when_it_cannot_be_reached(s3, few_retries, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        failed(TransferFailed, f"^{s3.url}/gms-root cannot be read: its store cannot be reached", lambda: open_shelf([s3.url]))
    with monkeypatch.context() as patched:
        patched.delenv("AWS_ALLOW_HTTP")
        error = failed(TransferFailed, "its endpoint is not one that may be used", lambda: open_shelf([s3.url]))
        assert "AWS_ALLOW_HTTP=true" in error.hint
    with monkeypatch.context() as patched:
        patched.delenv("AWS_ACCESS_KEY_ID")
        patched.delenv("AWS_SECRET_ACCESS_KEY")
        patched.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")
        error = failed(PermissionRefused, "there are no credentials for it", lambda: open_shelf([s3.url]))
        assert "AWS_ACCESS_KEY_ID" in error.hint
    failed(SnapshotNotFound, "there is no bucket none", lambda: open_shelf(["s3://none/prefix"], create=True))
    s3.harm.append(Harm("GET", "list-type", status=403, word="InvalidAccessKeyId"))
    failed(PermissionRefused, "model cannot be listed: the credentials are not valid", lambda: save_objects(open_shelf([s3.url], create=True)))


def test_store_is_named_when_it_does_not_answer(s3, few_retries, monkeypatch):
    monkeypatch.setenv("AWS_TIMEOUT", "300ms")
    answers = threading.Event()
    s3.harm.append(Harm("GET", "gms-root", times=10**6, call=answers.wait))
    try:
        error = failed(TransferFailed, f"^{s3.url}/gms-root cannot be read: its store has not answered in time", lambda: open_shelf([s3.url]))
    finally:
        answers.set()
    assert "AWS_TIMEOUT" in error.hint
    assert len(s3.seen) <= 3, "retries are bounded"


@pytest.mark.parametrize(
    ("url", "environment", "kind", "match"),
    [
        ("az://container/p", {}, PermissionRefused, "there are no credentials for it"),
        ("az://container/p", {"AZURE_STORAGE_ACCOUNT_NAME": "a", "AZURE_STORAGE_ACCOUNT_KEY": f"!{SECRET}"}, ConfigurationError, "are not valid"),
        ("gs://bucket/p", {"GOOGLE_APPLICATION_CREDENTIALS": f"/none/{SECRET}"}, ConfigurationError, "are not valid"),
        ("gs://bucket/p", {"GOOGLE_SERVICE_ACCOUNT_KEY": f"{{{SECRET}"}, ConfigurationError, "are not valid"),
    ],
)
def test_settings_are_named_when_a_store_cannot_be_used_with_them(monkeypatch, url, environment, kind, match):
    for name in [name for name in os.environ if name.startswith(("AZURE_", "GOOGLE_")) or name.upper().endswith("_PROXY")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    failed(kind, f"^{url[:-2]} cannot be used: .*{match}", lambda: open_shelf([url]))


@pytest.mark.parametrize(
    ("text", "kind", "match"),
    [
        ("Received redirect without LOCATION, this normally indicates an incorrectly configured region", TransferFailed, "in another region"),
        ("HTTP error: error sending request ... source: hyper::Error(Connect, ConnectError(dns error", TransferFailed, "cannot be resolved"),
        ("HttpError { kind: Timeout, source: reqwest::Error", TransferFailed, "has not answered in time"),
        ("Server returned non-2xx status code: 501 Not Implemented: <Code>NotImplemented</Code>", TransferFailed, r"refuses \(501 NotImplemented\)"),
        ("Error performing PUT http://169.254.169.254/latest/api/token in 1 ms - 403 Forbidden", PermissionRefused, "there are no credentials"),
        ("Unable to write: No space left on device (os error 28)", TransferFailed, "the disk is full"),
        ("The conditional put is not supported", TransferFailed, "does not say why"),
        ("something else", TransferFailed, "does not say why"),
    ],
)
def test_sentence_says_what_to_do_when_a_store_or_the_way_to_it_fails(text, kind, match):
    error = refusal(RuntimeError(f"{text} {SECRET}"), "made", "s3://bucket/key")
    assert type(error) is kind
    assert re.search(match, error.message)
    assert error.hint
    assert SECRET not in str(error)


@pytest.mark.parametrize("word", ["account_name", "redirect", "169.254.169.254", "metadata.google.internal"])
def test_words_of_the_path_are_not_taken_for_the_stores_when_it_has_odd_ones(s3, few_retries, word):
    shelf = open_shelf([f"{s3.url}/{word}"], create=True)
    save_objects(shelf, word)
    assert shelf.prune(word, version=1).removed == (1,)
    s3.harm.append(Harm("GET", "manifest.json|list-type", times=100, cut=1))
    failed(TransferFailed, "the connection to its store was cut", lambda: shelf.find(word))


def test_object_is_not_made_when_its_bytes_are_not_given_in_order(small):
    with contextlib.closing(small.bucket.open_shard("key", 3, 2, 1)) as shard:
        shard.write(memoryview(b"ab"), 0)
        with pytest.raises(TransferFailed, match="is to be written from position 3 on, and it has 2 bytes so far"):
            shard.write(memoryview(b"c"), 3)
        with pytest.raises(TransferFailed, match="is to have 3 bytes, and 2 were written"):
            shard.complete()
    assert not small.bucket.has("key")


@pytest.mark.parametrize(
    ("url", "name", "text", "seconds"),
    [("s3://b/k", "AWS", None, 30), ("s3://b/k", "AWS", "120s", 120), ("gs://b/k", "GOOGLE", "2m 5s", 125), ("az://b/k", "AZURE", "1min", 60)],
)
def test_part_is_waited_for_as_long_as_the_library_may_send_it(monkeypatch, url, name, text, seconds):
    monkeypatch.delenv(f"{name}_TIMEOUT", raising=False)
    if text is not None:
        monkeypatch.setenv(f"{name}_TIMEOUT", text)
    assert timeout_s(url) == seconds


def test_job_is_refused_when_it_cannot_be_done(small, large, tmp_path):
    backend = registry.find("object")
    for options, match in [
        ({"direct": "never"}, "has no option 'direct'"),
        ({"chunk_bytes": "5000"}, "is no part of a block"),
        ({"chunk_bytes": "x"}, "is no whole number"),
        ({"chunk_bytes": str(4 * MIB)}, "less than stores accept as a part"),
        ({"depth": "0"}, "is no whole number"),
    ]:
        with pytest.raises(InvalidArgument, match=match):
            backend.check(large.job("save", **options))
    with pytest.raises(InvalidArgument, match=f"would have more than {MOST_PARTS} parts of 8388608 bytes"):
        backend.check(replace(large.job("save"), files=[file._replace(size=8 * MIB * MOST_PARTS + PAGE_BYTES) for file in large.files]))
    with pytest.raises(InvalidArgument, match="threads cannot be started"):
        backend.check(large.job(workers=-1))
    with pytest.raises(InvalidArgument, match="'staged' moves files, and the snapshot's root is in an object store"):
        check(registry.find("staged"), small.job())
    with pytest.raises(InvalidArgument, match="'object' moves objects, and the snapshot's roots are directories"):
        check(backend, Scene(tmp_path).job())


@pytest.mark.parametrize(
    ("version", "match"), [(None, "not installed; pip install gms.object. brings it"), ("0.3.1", "obstore 0.3.1 is older than 0.12")]
)
def test_backend_says_what_it_lacks_when_the_library_is_not_there(s3, monkeypatch, version, match):
    def answer(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", answer)
    with pytest.raises(BackendUnavailable, match=match):
        registry.usable("object")
    with pytest.raises(BackendUnavailable, match=match) as raised:
        open_shelf([s3.url])
    assert "pip install gms[object]" in raised.value.hint


def test_error_is_one_of_gms_when_the_library_raises_anything(s3, monkeypatch):
    import obstore

    def raising(*_, **__):
        raise RuntimeError(f"something with {SECRET}")

    monkeypatch.setattr(obstore, "get", raising)
    error = failed(TransferFailed, "its store, or the library obstore, does not say why", lambda: open_shelf([s3.url]))
    assert isinstance(error, GmsError)
