"""What is written after publication is found, and the tensors are named: the plan by itself, and with real servers and processes."""

from __future__ import annotations

import itertools
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gms_core.audit import Audited, Part
from gms_core.audit.changes import changes
from gms_core.audit.chunks import FINEST_BYTES, MOST_CHUNKS, READ_BYTES, blocks, chunk_bytes, cut, differing, digest_of_all, digests_of
from gms_core.audit.places import Places, Tensor, tensors_of
from gms_core.errors import AcquireTimeout, DriverError, IdentityMismatch, LeaseConflict, ManifestError
from gms_core.layout import Allocation, Identity
from gms_core.tensor_manifest import StorageRecord, TensorRecord, encode
from tests.conftest import RunningServer
from tests.unit.publishing import publish
from tests.unit.stray_writer import MODEL, slot, storage, stray_writer, tensor

PAGE = 4096
SIZE = 64 * PAGE
MANIFEST = encode(
    (
        storage(0, 40_000, tensor("embed.weight", "head.weight", elements=10_000), tensor("embed.first", elements=100)),
        storage(40_448, 8_000, tensor("norm.mean", elements=2_000), shared=False),
        storage(100_000, 100_000, tensor("proj.weight", elements=100_000, dtype="float8_e4m3fn")),
    )
)
"""A tie, a view, a private copy, and bytes between them."""

offsets = st.integers(0, 5_000)


@st.composite
def arenas(draw: st.DrawFn) -> tuple[tuple[Allocation, ...], Places]:
    """Allocations with gaps, and tensors that lie anywhere, over one another too."""
    end, allocations = 0, []
    for number, (gap, size) in enumerate(draw(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 2_000)), max_size=4))):
        allocations.append(Allocation(number, end + gap, size))
        end += gap + size
    ranges = sorted(draw(st.lists(st.tuples(offsets, st.integers(1, 1_500)), max_size=8)))
    tensors = [Tensor((f"t{number}",), "uint8", (size,), offset, size, True) for number, (offset, size) in enumerate(ranges)]
    return tuple(allocations), Places(tensors)


def having(places: Places, byte: int) -> set[Tensor]:
    return {one for one in places.tensors if one.offset <= byte < one.end}


@given(arenas(), st.sampled_from([1, 16, 64, 4096]), st.integers(1, 5_000))
def test_every_byte_is_in_one_chunk_whose_bytes_all_have_the_same_tensors(
    arena: tuple[tuple[Allocation, ...], Places], chunk: int, most: int
) -> None:
    allocations, places = arena
    stretches = cut(allocations, places, chunk)
    for allocation, stretch in zip(allocations, stretches, strict=True):
        edges = list(stretch.edges)
        assert (edges[0], edges[-1]) == (allocation.offset, allocation.offset + allocation.size)
        for start, end in itertools.pairwise(edges):
            assert 0 < end - start <= chunk
            assert having(places, start) == having(places, end - 1) == set(places.at(start, end))
            assert places.borders(start, end) == []
    read = [(block.stretch.edges[0], block.first, block.last) for block in blocks(stretches, most)]
    assert [number for start, first, last in read for number in range(first, last)] == [k for one in stretches for k in range(len(one.edges) - 1)]
    assert all(block.size <= most or block.last == block.first + 1 for block in blocks(stretches, most))


@given(arenas(), st.sets(offsets, max_size=12), st.sampled_from([1, 16, 64]))
def test_change_names_the_tensors_that_have_the_byte_and_where_it_is(
    arena: tuple[tuple[Allocation, ...], Places], written: set[int], chunk: int
) -> None:
    allocations, places = arena
    memory = bytearray(20_000)
    stretches = cut(allocations, places, chunk)
    for block in blocks(stretches):
        block.stretch.keep(block.first, digests_of(block, bytes(memory[block.start : block.start + block.size])))
    before = digest_of_all(stretches)
    backed = {byte for byte in written if any(one.offset <= byte < one.offset + one.size for one in allocations)}
    for byte in written:
        memory[byte] += 1
    ranges = []
    for block in blocks(stretches):
        after = digests_of(block, bytes(memory[block.start : block.start + block.size]))
        ranges += differing(block, block.stretch.known(block.first, block.last), after)
        block.stretch.keep(block.first, after)
    found = changes(ranges, places)
    assert {frozenset(change.tensors) for change in found} == {frozenset(having(places, byte)) for byte in backed}
    assert (digest_of_all(stretches) != before) == bool(backed)
    for change in found:
        own = sorted(byte for byte in backed if having(places, byte) == set(change.tensors))
        assert change.first.offset <= own[0] < change.first.end
        assert change.last.offset <= own[-1] < change.last.end
        assert own[0] - change.first.offset < chunk
        assert change.last.end - own[-1] <= chunk
        assert change.parts <= len(own)
        assert len(own) <= change.size <= len(own) * chunk
        assert (change.parts == 1) == (change.first == change.last)


@given(st.integers(1, 2**44))
def test_memory_of_an_audit_is_bounded_when_the_pool_is_large(size: int) -> None:
    chunk = chunk_bytes(size)
    assert FINEST_BYTES <= chunk <= READ_BYTES
    assert chunk == READ_BYTES or size <= chunk * MOST_CHUNKS
    assert chunk == FINEST_BYTES or size > chunk // 2 * MOST_CHUNKS


def test_tensors_are_found_with_ties_views_and_the_bytes_that_they_have_when_the_manifest_names_them() -> None:
    found = {one.names: (one.offset, one.size, one.shared) for one in tensors_of(MANIFEST)}
    assert found == {
        ("embed.weight", "head.weight"): (0, 40_000, True),
        ("embed.first",): (0, 400, True),
        ("norm.mean",): (40_448, 8_000, False),
        ("proj.weight",): (100_000, 100_000, True),
    }


def test_tensor_counts_as_all_of_its_storage_when_it_is_not_understood_and_not_at_all_when_it_is_empty() -> None:
    odd = [
        TensorRecord("mystery", (3,), (1,), 0, False, True, (slot("a"),)),
        TensorRecord("float32", (3,), (1, 1), 0, False, True, (slot("b"),)),
        TensorRecord("float32", (3,), (1,), 2**61, False, True, (slot("c"),)),
        TensorRecord("float32", (0, 3), (3, 1), 5, False, True, (slot("d"),)),
        TensorRecord("float32", (2, 2), (8, 1), 1, False, True, ()),
    ]
    found = tensors_of(encode((StorageRecord(512, 100, "cpu", True, tuple(odd)),)))
    assert [(one.names[0], one.offset, one.size) for one in found] == [
        ("a", 512, 100),
        ("b", 512, 100),
        ("c", 512, 100),
        ("a tensor without a name", 516, 40),
    ]
    with pytest.raises(ManifestError):
        tensors_of(b"manifest")


@pytest.mark.parametrize(
    ("offset", "names"),
    [
        (401, [("embed.weight", "head.weight")]),
        (12, [("embed.weight", "head.weight"), ("embed.first",)]),
        (40_448, [("norm.mean",)]),
        (199_999, [("proj.weight",)]),
        (40_100, []),
        (SIZE - 1, []),
    ],
)
def test_tensor_is_named_when_a_process_writes_one_byte_of_it(
    server: RunningServer, tmp_path: Path, offset: int, names: list[tuple[str, ...]]
) -> None:
    with (
        stray_writer(server.socket, tmp_path, SIZE, MANIFEST) as writer,
        server.connect() as session,
        Audited(session, "weights", MODEL) as audited,
    ):
        assert audited.look().changes == ()
        before = audited.content
        assert audited.look().changes == ()
        assert audited.content == before
        writer.write(offset)
        look = audited.look()
        (change,) = look.changes
        assert [one.names for one in change.tensors] == sorted(names, key=lambda one: one[0] != "embed.first")
        assert change.first == change.last
        assert change.first.offset <= offset < change.first.end
        assert change.size == change.first.size <= PAGE
        assert audited.content != before
        assert audited.look().changes == ()  # compared with the look before, not with the first one
        assert (audited.looks, look.complete, look.error) == (3, True, None)
        assert session.status().pools[0].readers != ()
    with server.connect() as session:
        assert session.status().pools[0].readers == ()


def test_first_and_last_part_are_told_when_a_tensor_is_written_in_several_places(server: RunningServer, tmp_path: Path) -> None:
    with (
        stray_writer(server.socket, tmp_path, SIZE, MANIFEST) as writer,
        server.connect() as session,
        Audited(session, "weights", MODEL) as audited,
    ):
        audited.look()
        for offset in (102_401, 110_592, 150_000, 110_592 + PAGE, 0):
            writer.write(offset)
        tied, proj = audited.look().changes
        assert {one.names[0] for one in tied.tensors} == {"embed.first", "embed.weight"}
        assert [one.names for one in proj.tensors] == [("proj.weight",)]
        assert (proj.first, proj.last, proj.parts, proj.size) == (Part(102_400, PAGE), Part(147_456, PAGE), 3, 4 * PAGE)


def test_later_look_goes_on_when_the_server_is_killed_in_between(server: RunningServer, tmp_path: Path) -> None:
    with (
        stray_writer(server.socket, tmp_path, SIZE, MANIFEST) as writer,
        server.connect() as session,
        Audited(session, "weights", MODEL) as audited,
    ):
        audited.look()
        server.kill()
        assert audited.look().changes == ()
        writer.write(40_448)
        server.kill()
        assert [one.names for change in audited.look().changes for one in change.tensors] == [("norm.mean",)]
        assert audited.committed() == 1


def test_generation_is_kept_when_another_one_takes_its_place(server: RunningServer) -> None:
    with server.connect() as session, server.connect() as other:
        publish(session, b"first", identity=MODEL).release()
        with Audited(session, "weights", MODEL) as audited:
            audited.look()
            publish(other, b"other", identity=MODEL).release()
            assert audited.look().changes == ()
            assert audited.committed() == 2
            assert [one.generation for one in other.status().pools[0].generations] == [1, 2]
        assert [one.generation for one in other.status().pools[0].generations] == [2]


def test_offsets_are_told_without_names_when_the_manifest_is_something_else(server: RunningServer, tmp_path: Path) -> None:
    with (
        stray_writer(server.socket, tmp_path, SIZE, b"something else") as writer,
        server.connect() as session,
        Audited(session, "weights", MODEL) as audited,
    ):
        assert "no tensor manifest" in audited.unreadable
        audited.look()
        writer.write(5_000)
        (change,) = audited.look().changes
        assert (change.tensors, change.first) == ((), Part(PAGE, PAGE))


def test_nothing_is_leased_when_something_else_or_nothing_is_published(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gms_core.audit.audited.LEASE_S", 0.0)
    with server.connect() as session:
        with pytest.raises(AcquireTimeout):
            Audited(session, "weights", MODEL)
        publish(session, b"first").release()
        with pytest.raises(IdentityMismatch):
            Audited(session, "weights", Identity({"content": "other"}))
        assert session.status().pools[0].readers == ()


def test_what_was_found_is_told_when_the_look_is_stopped_or_fails_on_the_way(
    server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gms_core.audit.audited.THREADS", 1)
    size = 3 * READ_BYTES
    with (
        stray_writer(server.socket, tmp_path, size, MANIFEST) as writer,
        server.connect() as session,
        Audited(session, "weights", MODEL) as audited,
    ):
        assert not audited.look(lambda: True).complete
        assert audited.look().complete
        assert audited.looks == 0  # there was nothing to compare with
        writer.write(0)
        writer.write(size - 1)
        asked = iter([False])
        look = audited.look(lambda: next(asked, True))
        assert (look.complete, look.error, [change.first.offset for change in look.changes]) == (False, None, [0])
        writer.write(0)
        read, calls = session.driver.read, iter([True])

        def fails_later(address, size):
            if next(calls, False):
                return read(address, size)
            raise DriverError("the device has gone")

        with monkeypatch.context() as patch:
            patch.setattr(session.driver, "read", fails_later)
            look = audited.look()
        assert isinstance(look.error, DriverError)
        assert (look.complete, [change.first.offset for change in look.changes]) == (False, [0])
        assert [change.last.end for change in audited.look().changes] == [size]
        assert audited.looks == 1


def test_generation_cannot_be_dropped_when_it_is_audited(server: RunningServer) -> None:
    from gms_core.client import PoolGenerations

    with server.connect() as session, server.connect() as other:
        publish(session, b"first", identity=MODEL).release()
        with Audited(session, "weights", MODEL), pytest.raises(LeaseConflict):
            PoolGenerations(other, "weights").drop(1)
        PoolGenerations(other, "weights").drop(1)


def test_no_copy_of_the_memory_is_made_when_it_is_read(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with server.connect() as session:
        publish(session, os.urandom(5 * READ_BYTES), slab=4 * READ_BYTES, identity=MODEL).release()
        with Audited(session, "weights", MODEL) as audited:
            read, sizes, lock = session.driver.read, [], threading.Lock()

            def counted(address, size):
                with lock:
                    sizes.append(size)
                return read(address, size)

            monkeypatch.setattr(session.driver, "read", counted)
            audited.look()
            assert sum(sizes) == audited.layout.size
            assert max(sizes) <= READ_BYTES
