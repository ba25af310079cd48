"""Upstream's client of the library `gpu_memory_service`."""

import contextlib
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

import torch
from tensorrt_llm import _double
from tensorrt_llm.logger import logger

_MODES = ("auto", "rw", "ro")


@runtime_checkable
class GPUMemoryBackend(Protocol):
    @property
    def is_rw(self) -> bool | None: ...
    def connect(self) -> bool: ...
    def has_committed_weights(self) -> bool: ...
    def mem_pool_scope(self, device=None) -> AbstractContextManager: ...
    def materialize_module(self, model) -> None: ...
    def finalize_write(self, model) -> int: ...
    def move_untracked_params(self, model) -> None: ...
    def cleanup(self) -> None: ...


class GMSBackend:
    DEFAULT_TAG = "weights"

    def __init__(self, socket_path, mapping, mode="auto", tag=DEFAULT_TAG):
        if mode not in _MODES:
            raise ValueError(f"GMS mode must be one of {_MODES}, got {mode!r}")
        self._socket_path = socket_path
        self._mapping = mapping
        self._mode = mode
        self._tag = tag
        self._device_index = _double.current_device()
        self._client = None
        self._is_rw = None

    @property
    def is_rw(self):
        return self._is_rw

    def connect(self):
        try:
            from gpu_memory_service.client.torch.allocator import get_or_create_gms_client_memory_manager
            from gpu_memory_service.common.locks import GrantedLockType, RequestedLockType
            from gpu_memory_service.common.utils import get_socket_path
            from gpu_memory_service.integrations.common.patches import patch_empty_cache
        except ImportError as error:
            logger.warning("gpu_memory_service is not available: %s", error)
            return False
        wanted = {"rw": RequestedLockType.RW, "ro": RequestedLockType.RO, "auto": RequestedLockType.RW_OR_RO}[self._mode]
        try:
            if self._socket_path is None:
                self._socket_path = get_socket_path(self._device_index, self._tag)
            self._client = get_or_create_gms_client_memory_manager(self._socket_path, self._device_index, mode=wanted, tag=self._tag)
        except Exception as error:
            logger.warning("no GMS client for %s: %s", self._socket_path, error)
            self._client = None
            return False
        self._is_rw = self._client.granted_lock_type == GrantedLockType.RW
        patch_empty_cache()
        return True

    def has_committed_weights(self):
        return self._client is not None and self._is_rw is False

    def _connected(self):
        if self._client is None:
            raise RuntimeError("GMS backend is not connected")
        return self._client

    def _writing(self, what):
        client = self._connected()
        if not self._is_rw:
            raise RuntimeError(f"{what} is only valid in RW mode")
        return client

    @contextlib.contextmanager
    def mem_pool_scope(self, device=None):
        self._writing("mem_pool_scope")
        from gpu_memory_service.client.torch.allocator import gms_use_mem_pool

        with gms_use_mem_pool(self._tag, device or torch.device(_double.DEVICE)):
            yield

    def materialize_module(self, model):
        client = self._connected()
        from gpu_memory_service.client.torch.module import materialize_module_from_gms

        materialize_module_from_gms(client, model, device_index=self._device_index)

    def finalize_write(self, model):
        client = self._writing("finalize_write")
        from gpu_memory_service.integrations.common.utils import finalize_gms_write

        written = int(finalize_gms_write(client, model))
        self._is_rw = False
        return written

    def _owns(self, address):
        """Whether an address lies in a mapping, the first byte included and the end not; no mapping has an address or a size of zero."""
        mappings = getattr(self._client, "_mappings", None)
        if not mappings or not address:
            return False
        return any(one.va and one.size and one.va <= address < one.va + one.size for one in mappings.values())

    @staticmethod
    def _storage_bytes(tensor):
        return tensor.untyped_storage().nbytes()

    def move_untracked_params(self, model):
        client = self._connected()
        from gpu_memory_service.client.torch.module import _iter_module_tensors
        from gpu_memory_service.client.torch.tensor import _tensor_from_pointer

        found = [tensor for _, tensor, kind in _iter_module_tensors(model) if kind == "parameter" and not self._owns(tensor.data_ptr())]
        if not _double.HAS_STAGED_HOOKS:  # each parameter by itself: views of one storage part company
            for tensor in found:
                address = client.create_mapping(size=max(tensor.numel() * tensor.element_size(), 1), tag=self._tag)
                moved = _tensor_from_pointer(address, list(tensor.shape), list(tensor.contiguous().stride()), tensor.dtype, self._device_index)
                moved.copy_(tensor.data)
                tensor.data = moved
            return
        bases = {}
        for tensor in found:
            storage = tensor.untyped_storage()
            address = bases.get(storage.data_ptr())
            if address is None:
                size = self._storage_bytes(tensor)
                address = bases[storage.data_ptr()] = client.create_mapping(size=max(size, 1), tag=self._tag)
                whole = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (size,), (1,))
                _tensor_from_pointer(address, [size], [1], torch.uint8, self._device_index).copy_(whole)
            place = address + tensor.storage_offset() * tensor.element_size()
            tensor.data = _tensor_from_pointer(place, list(tensor.shape), list(tensor.stride()), tensor.dtype, self._device_index)

    def cleanup(self):
        client, self._client = self._client, None
        if _double.HAS_STAGED_HOOKS:
            self._is_rw = None
        if client is None:
            return
        try:
            from gpu_memory_service.client.torch.allocator import evict_gms_client_memory_manager

            client.close()
            evict_gms_client_memory_manager(client)
        except Exception as error:
            logger.warning("GMS cleanup: %s", error)

    if _double.HAS_STAGED_HOOKS:

        def get_source_identity(self):
            """Upstream stores none yet, so its gate lets everything pass."""
            return
