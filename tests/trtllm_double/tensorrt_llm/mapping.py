"""Which part of a model a rank has."""

from dataclasses import dataclass


@dataclass
class Mapping:
    world_size: int = 1
    rank: int = 0
    tp_size: int = 1

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp_size
