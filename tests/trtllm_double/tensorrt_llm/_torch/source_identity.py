"""What weights are that another process has, as far as upstream compares it."""

from dataclasses import dataclass


class SourceIdentityMismatchError(RuntimeError):
    pass


@dataclass(frozen=True)
class SourceIdentity:
    architecture: str
    tp_size: int
    tp_rank: int

    def check(self, remote):
        if remote is not None and remote != self:
            raise SourceIdentityMismatchError(f"local {self} is not remote {remote}")
