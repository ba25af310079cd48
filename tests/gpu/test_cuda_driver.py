"""The contract of memory drivers, on a GPU; and what only CUDA can show."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest
import torch

pytest.register_assert_rewrite("driver_contract")

from driver_contract import DriverContract  # noqa: E402 - after the line that makes its asserts talk
from driver_contract.harness import mapped, written  # noqa: E402

from gms_core.devices import HOST, cuda_uuid, free_bytes, list_gpus  # noqa: E402
from gms_core.errors import DeviceNotFound, DriverError  # noqa: E402
from gms_core.vmm import open_driver, open_physical_driver  # noqa: E402
from gms_core.vmm.driver import Access, Address, Driver  # noqa: E402

pytestmark = pytest.mark.gpu

RAW = """
from gms_core.vmm.cuda_calls import checked, find_device
checked("cuCtxPushCurrent", checked("cuDevicePrimaryCtxRetain", find_device(sys.argv[1])))
buffer = ctypes.create_string_buffer(1)
try:
    {call}
    checked("cuCtxSynchronize")
    print("touched")
except DriverError as error:
    print(f"refused: {{error}}")
"""

NO_CONTEXT = """
import os
from gms_core.vmm.cuda_calls import checked, find_device
handle = driver.create(size)
exported = driver.export(handle)
imported = driver.import_descriptor(exported, size)
address = driver.reserve(size)
driver.map(address, size, imported)
driver.set_access(address, size, Access.READ_WRITE)
driver.set_access(address, size, Access.READ)
driver.synchronize()
driver.memory_info()
driver.unmap(address, size)
driver.free_reservation(address, size)
driver.release(imported)
driver.release(handle)
os.close(exported)
print(checked("cuDevicePrimaryCtxGetState", find_device(sys.argv[1]))[1])
driver.close()
"""


@pytest.fixture(scope="module", autouse=True)
def context() -> Iterator[None]:
    """Keep the device's context for all tests of the module: what CUDA and PyTorch open for it is not what a test leaves behind."""
    torch.zeros(1, device="cuda")
    driver = open_driver(cuda_uuid(0))
    size = driver.granularity
    with mapped(driver, written(driver, size, b"warm"), size) as address:
        driver.read(address, 4)
    driver.memory_info()
    yield
    driver.close()


class TestCudaDriver(DriverContract):
    raw_read = RAW.format(call='checked("cuMemcpyDtoH", ctypes.addressof(buffer), address, 1)')
    raw_write = RAW.format(call='checked("cuMemsetD8", address, 1, 1)')

    @property
    def device(self):
        return cuda_uuid(0)

    @pytest.fixture
    def driver(self) -> Iterator[Driver]:
        driver = open_driver(self.device)
        yield driver
        driver.close()

    def check_refused(self, result: subprocess.CompletedProcess[str]) -> None:
        assert result.stdout.startswith("refused: "), (result.stdout, result.stderr)

    def test_no_context_is_made_when_memory_is_only_managed(self, size: int) -> None:
        result = self.in_child(NO_CONTEXT, size)
        assert result.stdout.strip() == "0", result.stderr

    def test_sealing_is_no_promise_when_the_memory_is_a_gpus(self, driver: Driver, size: int) -> None:
        handle = driver.create(size)
        assert driver.seal(handle) is False
        with mapped(driver, handle, size) as address:
            driver.set_access(address, size, Access.READ)
            driver.set_access(address, size, Access.READ_WRITE)
            driver.write(address, b"still ours")

    def test_error_says_call_result_and_sizes_when_cuda_refuses(self, driver: Driver, size: int) -> None:
        from gms_core.vmm.cuda_calls import checked  # it needs the bindings of CUDA, which the machine that only collects tests lacks

        with pytest.raises(DriverError, match=r"^cuMemAddressFree failed: CUDA_ERROR_\w+ \([a-z].*\); 4096 bytes$"):
            checked("cuMemAddressFree", 0, 4096, about="4096 bytes")

    def test_torch_sees_the_bytes_when_its_memory_is_the_drivers(self, driver: Driver) -> None:
        size = 64 * driver.granularity
        handle = driver.create(size)
        expected = torch.arange(size // 4, dtype=torch.int32)
        with mapped(driver, handle, size) as address:
            driver.write(address, expected.numpy().tobytes())
            pointer = {"shape": (size // 4,), "typestr": "<i4", "data": (int(address), False), "version": 3}
            view = torch.as_tensor(type("Array", (), {"__cuda_array_interface__": pointer})(), device="cuda:0")
            assert torch.equal(view.cpu(), expected)
            view += 1
            driver.synchronize()
            assert driver.read(Address(address + size - 4), 4) == (size // 4).to_bytes(4, "little")
            del view

    def test_hundreds_of_slabs_become_one_range_when_they_are_mapped_side_by_side(self, driver: Driver) -> None:
        unit, count = driver.granularity, 300
        address = driver.reserve(count * unit)
        for place in range(count):
            driver.map(Address(address + place * unit), unit, driver.create(unit))
        driver.set_access(address, count * unit, Access.READ_WRITE)
        data = bytes(range(256)) * (count * unit // 256)
        driver.write(address, data)
        driver.set_access(address, count * unit, Access.READ)
        assert driver.read(address, count * unit) == data
        driver.unmap(address, count * unit)
        driver.free_reservation(address, count * unit)


def test_server_half_is_the_same_driver_when_a_gpu_is_opened() -> None:
    driver = open_physical_driver(cuda_uuid(0), 4096)
    assert driver.name == "cuda"
    assert driver.memory_info().total > 2**30 - 1
    driver.close()


def test_uuids_of_cuda_and_nvml_agree_when_a_gpu_is_listed() -> None:
    gpus = {gpu.id: gpu for gpu in list_gpus()}
    device = cuda_uuid(0)
    assert device in gpus
    assert HOST not in gpus
    assert gpus[device].name
    assert 0 < free_bytes(device) <= gpus[device].total_bytes


def test_device_is_not_found_when_cuda_does_not_show_it() -> None:
    with pytest.raises(DeviceNotFound, match="CUDA_VISIBLE_DEVICES"):
        open_driver("GPU-00000000-0000-0000-0000-000000000000")
    with pytest.raises(DeviceNotFound, match="CUDA_VISIBLE_DEVICES"):
        cuda_uuid(4096)
    with pytest.raises(DeviceNotFound, match="NVML"):
        free_bytes("GPU-00000000-0000-0000-0000-000000000000")
