"""What every memory driver promises, as tests. `unit/test_host_driver.py` and `gpu/test_cuda_driver.py` both run them."""

from driver_contract.addresses import AddressContract
from driver_contract.memory import MemoryContract
from driver_contract.sealing import SealingContract


class DriverContract(MemoryContract, AddressContract):
    """The promises of `gms_core.vmm.driver`."""


__all__ = ["DriverContract", "SealingContract"]
