"""What upstream asks MPI; here PyTorch's own group of processes, as far as one was made."""

import torch
import torch.distributed as dist


def mpi_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def mpi_world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def mpi_broadcast(obj, root=0):
    if not dist.is_initialized():
        return obj
    box = [obj]
    dist.broadcast_object_list(box, src=root)
    return box[0]


def mpi_allgather(obj):
    if not dist.is_initialized():
        return [obj]
    found = [None] * mpi_world_size()
    dist.all_gather_object(found, obj)
    return found


def allreduce(tensor: torch.Tensor) -> torch.Tensor:
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor
