"""Groups of ranks for tests, each rank in a thread of its own, that speak as engines' groups do."""

from __future__ import annotations

import threading


class Group:
    """All ranks of one engine."""

    def __init__(self, size):
        self._met, self._said = threading.Barrier(size, timeout=60), [None] * size

    def rank(self, number):
        return Rank(self, number)

    def gather(self, rank, obj):
        self._said[rank] = obj
        self._met.wait()
        said = list(self._said)
        self._met.wait()  # nobody says the next thing before all have heard this one
        return said


class Rank:
    def __init__(self, group, rank_in_group):
        self.rank_in_group, self._group = rank_in_group, group

    def broadcast_object(self, obj, src=0):
        return self._group.gather(self.rank_in_group, obj)[src]

    def all_gather_object(self, obj):
        return self._group.gather(self.rank_in_group, obj)
