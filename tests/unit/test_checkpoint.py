"""Digests of checkpoints: what changes them, what they cost, and what their cache survives."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gms_core import checkpoint
from gms_core.checkpoint import THREADS, cached_digest, content_digest
from gms_core.errors import CheckpointNotFound


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return write(tmp_path / "model", {"model-1.safetensors": b"first" * 1000, "model-2.safetensors": b"second" * 1000})


def write(folder: Path, contents: dict[str, bytes]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in contents]


def bytes_read() -> int:
    """Bytes that this process has read from files, as the kernel counts them."""
    counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counters["rchar"])


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(checkpoint, "READ_BYTES", 1000)


def test_digest_is_equal_when_the_same_files_lie_elsewhere_in_another_order(files: list[Path], tmp_path: Path, cache: Path) -> None:
    copy = write(tmp_path / "copy", {path.name: path.read_bytes() for path in reversed(files)})
    assert content_digest(files, cache) == content_digest(copy, cache)


def test_digest_differs_when_one_byte_differs(files: list[Path], cache: Path) -> None:
    before = content_digest(files, cache)
    content = bytearray(files[1].read_bytes())
    content[-1] ^= 1
    files[1].write_bytes(content)
    assert content_digest(files, cache) != before


def test_digest_differs_when_bytes_move_from_one_file_to_the_next(tmp_path: Path, cache: Path) -> None:
    one = write(tmp_path / "one", {"a": b"xy", "b": b"z"})
    other = write(tmp_path / "other", {"a": b"x", "b": b"yz"})
    assert content_digest(one, cache) != content_digest(other, cache)


@pytest.mark.usefixtures("small_chunks")
def test_every_byte_counts_when_a_file_has_several_chunks(tmp_path: Path, cache: Path) -> None:
    content = os.urandom(3 * 4096 + 17)
    digests = {content_digest(write(tmp_path / "0", {"a": content}), cache)}
    for position in (0, 999, 4095, 4096, 8192, len(content) - 1):
        changed = bytearray(content)
        changed[position] ^= 1
        digests.add(content_digest(write(tmp_path / f"{position}", {"a": bytes(changed)}), cache))
    assert len(digests) == 7


def test_no_weights_are_read_when_the_digest_is_known(tmp_path: Path, cache: Path) -> None:
    files = write(tmp_path / "model", {"a.safetensors": bytes(2**22)})
    digest = content_digest(files, cache)
    before = bytes_read()
    assert cached_digest(files, cache) == digest
    assert content_digest(files, cache) == digest
    assert bytes_read() - before < 2**16


def test_cached_digest_is_none_when_nothing_was_read_yet(files: list[Path], cache: Path) -> None:
    assert cached_digest(files, cache) is None


def test_cached_digest_is_none_when_a_file_has_changed(files: list[Path], cache: Path) -> None:
    content_digest(files, cache)
    files[0].write_bytes(b"changed")
    assert cached_digest(files, cache) is None


def test_cached_digest_is_none_when_a_file_has_other_bytes_but_the_old_size_and_time(files: list[Path], cache: Path) -> None:
    content_digest(files, cache)
    before = files[0].stat()
    with files[0].open("r+b") as file:
        file.write(b"other")
    os.utime(files[0], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert cached_digest(files, cache) is None


def test_cached_digest_is_none_when_a_file_is_gone(files: list[Path], cache: Path) -> None:
    content_digest(files, cache)
    files[0].unlink()
    assert cached_digest(files, cache) is None


def test_cached_digest_is_none_when_there_are_no_files(cache: Path) -> None:
    assert cached_digest([], cache) is None


def test_files_are_read_again_when_forced(files: list[Path], cache: Path) -> None:
    digest = content_digest(files, cache)
    before = bytes_read()
    assert content_digest(files, cache, force=True) == digest
    assert bytes_read() - before >= sum(path.stat().st_size for path in files)


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'{"a": 1}', b"\xff\xfe"])
def test_cache_is_made_anew_when_it_is_damaged(damage: bytes, files: list[Path], cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    digest = content_digest(files, cache)
    (cache / "digests.json").write_bytes(damage)
    assert cached_digest(files, cache) is None
    assert content_digest(files, cache) == digest
    assert cached_digest(files, cache) == digest
    assert "made anew" in caplog.text


def test_cache_is_private_when_it_is_made(files: list[Path], cache: Path) -> None:
    content_digest(files, cache)
    assert stat.S_IMODE((cache / "digests.json").stat().st_mode) == 0o600
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert sorted(path.name for path in cache.iterdir()) == ["digests.json", "digests.lock"]


def test_digest_is_right_when_the_cache_cannot_be_written(files: list[Path], tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert content_digest(files, tmp_path / "file" / "cache") == content_digest(files, cache)
    assert "cannot be remembered" in caplog.text


def test_checkpoint_not_found_when_there_are_no_files(cache: Path) -> None:
    with pytest.raises(CheckpointNotFound):
        content_digest([], cache)


def test_checkpoint_not_found_when_a_file_is_missing(files: list[Path], cache: Path) -> None:
    files[0].unlink()
    with pytest.raises(CheckpointNotFound, match="model-1"):
        content_digest(files, cache)


def test_weights_are_read_once_when_several_ask_at_the_same_time(tmp_path: Path, cache: Path) -> None:
    files = write(tmp_path / "model", {"a.safetensors": bytes(2**23)})
    found: list[str] = []
    before = bytes_read()
    threads = [threading.Thread(target=lambda: found.append(content_digest(files, cache))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 4
    assert bytes_read() - before < 2 * 2**23


@pytest.mark.parametrize("trouble", [OSError("the disk is bad"), KeyboardInterrupt()])
def test_files_that_nobody_reads_yet_are_left_when_one_cannot_be_read_or_ctrl_c_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: BaseException
) -> None:
    """The other readers stand still until the pool of threads is told to end, however far they would have come meanwhile."""
    files = [tmp_path / f"{number:02}.safetensors" for number in range(40)]
    for path in files:
        path.write_bytes(b"x")
    begun: list[Path] = []
    told = threading.Event()

    class Threads(ThreadPoolExecutor):
        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            told.set()
            super().shutdown(wait=wait)

    def reader(path: Path) -> Callable[[int], bytes]:
        def digest(_: int) -> bytes:
            begun.append(path)
            if path == files[3]:
                raise trouble
            assert told.wait(5)
            return b"digest"

        return digest

    monkeypatch.setattr("gms_core.checkpoint.ThreadPoolExecutor", Threads)
    monkeypatch.setattr("gms_core.checkpoint._chunk_reader", reader)
    with pytest.raises((CheckpointNotFound, KeyboardInterrupt)):
        content_digest(files, tmp_path / "cache")
    assert len(begun) <= THREADS + 1
