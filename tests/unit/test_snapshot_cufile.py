"""cuFile, of which a machine without a GPU has no driver: what is asked of it, by a stand-in that reads files into host memory, and every refusal."""

from __future__ import annotations

import ctypes
import os
import sys
import types
from pathlib import Path

import pytest

from gms_core.errors import BackendUnavailable, DriverUnavailable, SnapshotDamaged, TransferFailed
from gms_core.snapshot import registry
from gms_core.snapshot.backends import asking, cufile_gds, cufile_library
from gms_core.snapshot.manifest import PAGE_BYTES
from tests.unit.snapshot_transfers import LateMemory, Scene, descriptors, rings, transfer_threads


class CuFile:
    """The calls of `cuda.bindings.cufile` that are used, on files and on memory of the host."""

    class cuFileError(Exception):
        pass

    FileHandleType = types.SimpleNamespace(OPAQUE_FD=1)
    BoolConfigParameter = types.SimpleNamespace(PROPERTIES_ALLOW_COMPAT_MODE=1)

    def __init__(self, most=2**30, refuses=(), fails_at=-1):
        self.most, self.refuses, self.fails_at = most, refuses, fails_at
        self.files, self.memory, self.calls, self.uses = {}, {}, [], 0

    def Descr(self):
        description = types.SimpleNamespace(handle=types.SimpleNamespace())
        description.ptr = description
        return description

    def handle_register(self, description):
        assert description.type == self.FileHandleType.OPAQUE_FD
        self._refuse("handle_register")
        self.files[id(description)] = description.handle.fd
        return id(description)

    def handle_deregister(self, handle):
        del self.files[handle]

    def buf_register(self, address, size, flags):
        self._refuse("buf_register")
        self.memory[address] = size

    def buf_deregister(self, address):
        del self.memory[address]

    def read(self, handle, base, size, file_offset, offset):
        if "buf_register" not in self.refuses:
            assert offset + size <= self.memory[base], "what is registered is known by the begin of its range"
        if file_offset == self.fails_at:
            raise self.cuFileError("IO_DISABLED (5038)")
        view = memoryview((ctypes.c_ubyte * min(size, self.most)).from_address(base + offset)).cast("B")
        return os.preadv(self.files[handle], [view], file_offset)

    def get_version(self):
        return 1140

    def use_count(self):
        return self.uses

    def set_parameter_bool(self, parameter, value):
        self.calls.append((parameter, value))

    def driver_open(self):
        self._refuse("driver_open")
        self.calls.append("open")
        self.uses += 1

    def _refuse(self, call):
        if call in self.refuses:
            raise self.cuFileError("INTERNAL_ERROR (5030)")


class OfGpu(LateMemory):
    def places(self, offset, size):
        return [place._replace(gpu=0) for place in super().places(offset, size)]


@pytest.fixture(autouse=True)
def nothing_left():
    before = descriptors(), rings()
    yield
    assert transfer_threads() == []
    assert (descriptors(), rings()) == before


@pytest.fixture
def scene(tmp_path):
    scene = Scene(tmp_path)
    scene.fill_files()
    return scene


def _restored(scene, monkeypatch, cufile, memory_of=OfGpu):
    monkeypatch.setattr(cufile_gds, "opened", lambda: cufile)
    try:
        return scene.restore("cufile-gds", memory_of, direct="never")
    finally:
        assert not cufile.files
        assert not cufile.memory


@pytest.mark.parametrize("most", [2**30, PAGE_BYTES], ids=["at once", "in parts"])
def test_image_is_the_same_when_cufile_reads_it(scene, monkeypatch, most):
    target, moved = _restored(scene, monkeypatch, CuFile(most))
    assert target.bytes[:] == scene.filled().bytes[:]
    assert moved.bytes == scene.size
    assert moved.notes == ()


def test_it_is_told_when_cufile_does_not_register_the_memory(scene, monkeypatch):
    target, moved = _restored(scene, monkeypatch, CuFile(refuses=("buf_register",)))
    assert target.bytes[:] == scene.filled().bytes[:]
    assert any("could not register the memory" in note for note in moved.notes)


def test_file_is_named_when_cufile_does_not_read_it_directly(scene, monkeypatch):
    with pytest.raises(TransferFailed, match=r"cuFile cannot read .*\.shard directly: INTERNAL_ERROR") as caught:
        _restored(scene, monkeypatch, CuFile(refuses=("handle_register",)))
    assert "'staged'" in caught.value.hint


def test_file_and_position_are_named_when_cufile_fails(scene, monkeypatch):
    position = scene.pieces[2].position
    with pytest.raises(TransferFailed, match=rf"cuFile could not read \d+ bytes at position {position} of .*IO_DISABLED.*plain read of them works"):
        _restored(scene, monkeypatch, CuFile(fails_at=position))


def test_damage_is_told_when_a_bit_is_wrong_or_the_end_is_missing(scene, monkeypatch):
    scene.flip(scene.pieces[1])
    with pytest.raises(SnapshotDamaged, match="have the checksum"):
        _restored(scene, monkeypatch, CuFile())
    scene.flip(scene.pieces[1])

    class Cutting(CuFile):
        def handle_register(self, description):
            os.truncate(scene.files[1].path, PAGE_BYTES)
            return super().handle_register(description)

    with pytest.raises(SnapshotDamaged, match="ends at position"):
        _restored(scene, monkeypatch, Cutting())


def test_host_memory_is_refused_when_cufile_is_to_read_into_it(scene, monkeypatch):
    with pytest.raises(BackendUnavailable, match="'cufile-gds' reads into a GPU's memory alone, and this is the device 'host'"):
        _restored(scene, monkeypatch, CuFile(), LateMemory)


@pytest.mark.parametrize(
    ("modules", "words"),
    [(None, "does not list its modules"), ("nvidia 1 0 - Live 0x0\nnvidia_fs_x 1 0 - Live 0x0\n", "nvidia_fs is not loaded.*slower than")],
    ids=["no list", "not loaded"],
)
def test_reason_is_told_when_the_kernel_lacks_what_cufile_needs(tmp_path, monkeypatch, modules, words):
    path = tmp_path / "modules"
    if modules is not None:
        path.write_text(modules)
    monkeypatch.setattr(cufile_library, "MODULES", path)
    for refused in (cufile_library.refuse_without_kernel_module, cufile_gds.opened):
        with pytest.raises(BackendUnavailable, match=words):
            refused()


def test_nothing_is_refused_when_the_kernel_has_the_module(tmp_path, monkeypatch):
    (tmp_path / "modules").write_text("nvidia_fs 327680 0 - Live 0x0000000000000000 (OE)\n")
    monkeypatch.setattr(cufile_library, "MODULES", tmp_path / "modules")
    cufile_library.refuse_without_kernel_module()


def test_version_is_named_when_the_bindings_are_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(BackendUnavailable, match="bindings of cuFile cannot be imported") as caught:
        cufile_library.bindings()
    assert "12.9" in caught.value.hint


@pytest.fixture
def driver(monkeypatch):
    """A driver of CUDA that is there; returns what replaces its initialisation."""
    calls = types.ModuleType("gms_core.vmm.cuda_calls")
    calls.initialise = lambda: None
    monkeypatch.setitem(sys.modules, "gms_core.vmm.cuda_calls", calls)
    return calls


def test_compatibility_mode_is_off_before_the_driver_opens_and_it_opens_once(monkeypatch, driver):
    cufile = CuFile()
    monkeypatch.setattr(cufile_library, "bindings", lambda: cufile)
    assert [cufile_library.open_driver() for _ in range(2)] == ["cuFile 1.14"] * 2
    assert cufile.calls == [(CuFile.BoolConfigParameter.PROPERTIES_ALLOW_COMPAT_MODE, False), "open"]


def test_reason_is_told_when_the_driver_does_not_open(monkeypatch, driver):
    monkeypatch.setattr(cufile_library, "bindings", lambda: CuFile(refuses=("driver_open",)))
    with pytest.raises(BackendUnavailable, match="driver of cuFile does not open: INTERNAL_ERROR") as caught:
        cufile_library.open_driver()
    assert "gdscheck" in caught.value.hint

    def no_gpu():
        raise DriverUnavailable("cuInit failed: no GPU", hint="Look at nvidia-smi.")

    driver.initialise = no_gpu
    with pytest.raises(BackendUnavailable, match="no GPU"):
        cufile_library.open_driver()


def test_command_goes_on_when_the_driver_never_opens(tmp_path, monkeypatch):
    """As it does where the kernel does not list its modules; that is looked at first, and this is for whatever else may hang."""
    (tmp_path / "sitecustomize.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(asking, "DEADLINE_S", 0.3)
    for name in ("cufile-gds", "nixl-gds"):
        with pytest.raises(BackendUnavailable, match=r"has not come back after 0\.3 seconds"):
            registry.usable(name)


@pytest.mark.skipif(
    "nvidia_fs" in (Path("/proc/modules").read_text() if Path("/proc/modules").exists() else ""), reason="this machine has cuFile's module"
)
@pytest.mark.parametrize("name", ["cufile-gds", "nixl-gds"])
def test_reason_is_told_when_this_machine_has_no_module_of_cufile(name):
    with pytest.raises(BackendUnavailable, match=f"'{name}' cannot be used here: .*modules?"):
        registry.usable(name)
