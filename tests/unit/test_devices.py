"""Names of devices: what GMS makes of the answers of NVML and CUDA. The answers of a real machine are in ``tests/gpu``."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator

import pytest

import gms_core.devices
from gms_core.devices import Device, cuda_uuid, free_bytes, list_gpus
from gms_core.errors import DeviceNotFound, DriverError, DriverUnavailable, OutOfMemory
from gms_core.vmm import open_driver

GPU = "GPU-6f3a1b52-0c5d-4e0f-9b1a-2f6f8f0d3c11"
MIG = "MIG-1d2c3b4a-5e6f-4071-8293-a4b5c6d7e8f9"


class Nvml(types.ModuleType):
    """The answers of a machine with one whole GPU and one that is cut into an instance; handles are names here."""

    NVML_DEVICE_MIG_ENABLE = 1

    class NVMLError(Exception):
        pass

    class NVMLError_NotFound(NVMLError):
        pass

    class NVMLError_NotSupported(NVMLError):
        pass

    class NVMLError_FunctionNotFound(NVMLError):
        pass

    class NVMLError_InvalidArgument(NVMLError):
        pass

    broken = False

    def nvmlInit(self) -> None:
        if self.broken:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return ("whole", "cut")[index]

    def nvmlDeviceGetMigMode(self, handle: str) -> tuple[int, int]:
        if handle == "whole":
            raise self.NVMLError_NotSupported("Not Supported")
        return 1, 1

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: str) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: str, place: int) -> str:
        if place != 2:
            raise self.NVMLError_NotFound("Not Found")
        return "instance"

    def nvmlDeviceGetUUID(self, handle: str) -> str:
        return {"whole": GPU, "instance": MIG}[handle]

    def nvmlDeviceGetName(self, handle: str) -> str:
        return {"whole": "NVIDIA H200", "instance": "NVIDIA H200 MIG 1g.18gb"}[handle]

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> types.SimpleNamespace:
        return {"whole": types.SimpleNamespace(total=150, free=120), "instance": types.SimpleNamespace(total=18, free=17)}[handle]

    def nvmlDeviceGetHandleByUUID(self, identifier: str) -> str:
        if identifier not in (GPU, MIG):
            raise self.NVMLError_NotFound("Not Found")
        return {GPU: "whole", MIG: "instance"}[identifier]


@pytest.fixture
def nvml(monkeypatch) -> Iterator[Nvml]:
    module = Nvml("pynvml")
    monkeypatch.setitem(sys.modules, "pynvml", module)
    gms_core.devices._nvml.cache_clear()
    yield module
    gms_core.devices._nvml.cache_clear()


class Cuda(types.ModuleType):
    """The answers of bindings whose calls give ``results``: a number, or a number and values."""

    CUdevice_attribute = types.SimpleNamespace(CU_DEVICE_ATTRIBUTE_KNOWN=1)

    def __init__(self) -> None:
        super().__init__("cuda.bindings.driver")
        self.results: dict[str, object] = {}

    def __getattr__(self, name: str):
        if name not in self.results:
            raise AttributeError(name)

        def call(*_: object) -> object:
            result = self.results[name]
            if isinstance(result, Exception):
                raise result
            return result

        return call

    def cuGetErrorName(self, result: int) -> tuple[int, bytes]:
        return 0, {1: b"CUDA_ERROR_INVALID_VALUE", 2: b"CUDA_ERROR_OUT_OF_MEMORY", 100: b"CUDA_ERROR_NO_DEVICE"}[result]

    def cuGetErrorString(self, result: int) -> tuple[int, bytes]:
        return 0, {1: b"invalid argument", 2: b"out of memory", 100: b"no CUDA-capable device is detected"}[result]


@pytest.fixture
def bindings(monkeypatch) -> Iterator[Cuda]:
    module, package = Cuda(), types.ModuleType("cuda.bindings")
    package.driver = module  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", package)
    monkeypatch.delitem(sys.modules, "gms_core.vmm.cuda_calls", raising=False)
    yield module
    sys.modules.pop("gms_core.vmm.cuda_calls", None)


def calls():
    return importlib.import_module("gms_core.vmm.cuda_calls")


# NVML


@pytest.mark.usefixtures("nvml")
def test_instances_stand_in_place_of_their_gpu_when_mig_is_on() -> None:
    assert list_gpus() == [Device(GPU, "NVIDIA H200", 150), Device(MIG, "NVIDIA H200 MIG 1g.18gb", 18)]


@pytest.mark.usefixtures("nvml")
def test_free_memory_is_that_of_the_instance_when_its_uuid_is_asked_for() -> None:
    assert (free_bytes(GPU), free_bytes(MIG)) == (120, 17)
    with pytest.raises(DeviceNotFound, match="nvidia-smi -L"):
        free_bytes("GPU-none")


def test_install_command_is_told_when_the_bindings_of_nvml_are_missing(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    gms_core.devices._nvml.cache_clear()
    with pytest.raises(DriverUnavailable, match=r"gms\[cuda\]"):
        list_gpus()


def test_reason_is_told_when_nvml_does_not_start(nvml: Nvml) -> None:
    nvml.broken = True
    with pytest.raises(DriverUnavailable, match="Driver Not Loaded"):
        list_gpus()


# CUDA


def test_install_command_is_told_when_the_bindings_of_cuda_are_missing(monkeypatch) -> None:
    for name in ("cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("gms_core.vmm.cuda", "gms_core.vmm.cuda_calls"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for call in (lambda: cuda_uuid(0), lambda: open_driver(GPU)):
        with pytest.raises(DriverUnavailable, match=r"gms\[cuda\]"):
            call()


@pytest.mark.parametrize(
    ("call", "name", "identifier"),
    [
        ("cuDeviceGetUuid_v2", b"NVIDIA H200 MIG 1g.18gb\0\0", MIG),
        ("cuDeviceGetUuid", b"NVIDIA H200\0\0", GPU),
    ],
)
def test_uuid_is_written_as_nvml_does_when_cuda_tells_it(bindings: Cuda, call: str, name: bytes, identifier: str) -> None:
    number = types.SimpleNamespace(bytes=bytes.fromhex(identifier[4:].replace("-", "")))
    bindings.results |= {"cuInit": (0,), "cuDeviceGetCount": (0, 1), "cuDeviceGet": (0, 0), call: (0, number), "cuDeviceGetName": (0, name)}
    assert cuda_uuid(0) == identifier
    assert calls().find_device(identifier) == 0
    with pytest.raises(DeviceNotFound, match=identifier):
        calls().find_device("GPU-another")
    with pytest.raises(DeviceNotFound, match="it sees 1"):
        cuda_uuid(1)


def test_error_names_call_result_and_sizes_when_cuda_refuses(bindings: Cuda) -> None:
    bindings.results["cuMemMap"] = (1,)
    with pytest.raises(DriverError) as refused:
        calls().checked("cuMemMap", about="4096 bytes at 0x1000")
    assert str(refused.value) == "cuMemMap failed: CUDA_ERROR_INVALID_VALUE (invalid argument); 4096 bytes at 0x1000"
    assert refused.value.details == {"call": "cuMemMap", "result": "CUDA_ERROR_INVALID_VALUE"}


def test_error_can_be_tried_again_when_the_device_is_full(bindings: Cuda) -> None:
    bindings.results["cuMemCreate"] = (2, None)
    with pytest.raises(OutOfMemory) as refused:
        calls().checked("cuMemCreate", about="4096 bytes")
    assert refused.value.retryable


def test_hint_says_where_to_look_when_no_gpu_is_visible(bindings: Cuda) -> None:
    bindings.results["cuInit"] = (100,)
    with pytest.raises(DriverUnavailable, match="CUDA_VISIBLE_DEVICES"):
        cuda_uuid(0)


@pytest.mark.parametrize("error", [RuntimeError("libcuda.so.1 is not there"), None])
def test_hint_says_what_to_install_when_library_or_function_is_missing(bindings: Cuda, error: Exception | None) -> None:
    if error is not None:
        bindings.results["cuInit"] = error
    with pytest.raises(DriverUnavailable, match="newer NVIDIA driver"):
        calls().initialise()


def test_error_is_typed_when_the_bindings_do_not_know_the_result(bindings: Cuda) -> None:
    bindings.results["cuMemMap"] = ValueError("917 is not a valid CUresult")
    with pytest.raises(DriverError, match="917"):
        calls().checked("cuMemMap")


def test_values_are_given_as_the_call_has_them_when_it_succeeds(bindings: Cuda) -> None:
    bindings.results |= {"cuMemUnmap": (0,), "cuDeviceGet": (0, 3), "cuDevicePrimaryCtxGetState": (0, 0, 1), "cuDeviceGetAttribute": (0, 1)}
    assert calls().checked("cuMemUnmap") is None
    assert calls().checked("cuDeviceGet") == 3
    assert calls().checked("cuDevicePrimaryCtxGetState") == (0, 1)
    assert (calls().attribute("KNOWN", 0), calls().attribute("NEWER_THAN_THE_BINDINGS", 0)) == (1, 0)
