"""Which nodes of an engine are there, and whether it can go on, as a pure machine. Times are seconds of one clock.

The agent of the first node knows all others, and they know it alone.
"""

from __future__ import annotations

from collections.abc import Collection


class Together:
    """What one agent knows of those that it is to be connected with.

    They gather; once all are there, each is to be heard of every so often, until the engine departs: then they may go, and it ends by itself.

    Attributes:
        is_departing: Whether the engine ends in order.
    """

    def __init__(self, nodes: Collection[int], *, now: float, patience_s: float, timeout_s: float) -> None:
        """Begin to gather.

        Args:
            nodes: Numbers of the nodes to be connected with.
            now: The time.
            patience_s: Seconds until all have to be there.
            timeout_s: Seconds of silence after which a node is lost.
        """
        self._missing = set(nodes)
        self._heard: dict[int, float] = {}
        self._patience_s, self._timeout_s = patience_s, timeout_s
        self._gather_by = now + patience_s
        self.is_departing = False

    @property
    def missing(self) -> tuple[int, ...]:
        """Nodes that have not come yet."""
        return tuple(sorted(self._missing))

    def refusal(self, node: int) -> str:
        """Why this node cannot come; empty if it can."""
        if node in self._heard:
            return f"node {node} is there already"
        if self.is_departing:
            return "the engine ends"
        return "" if node in self._missing else f"there is no node {node}"

    def came(self, node: int, now: float) -> None:
        """A node has come that was not refused."""
        self._missing.remove(node)
        self._heard[node] = now

    def heard(self, node: int, now: float) -> None:
        """A node has said something."""
        self._heard[node] = now

    def departs(self) -> None:
        """The engine ends in order."""
        self.is_departing = True

    def went(self, node: int, why: str) -> str:
        """A node's connection has ended; returns why the engine has to end, empty if it need not."""
        self._heard.pop(node, None)
        return "" if self.is_departing else f"node {node} is gone: {why}"

    def reason_to_end(self, now: float) -> str:
        """Why the engine has to end by now; empty if it need not."""
        if self.is_departing:
            return ""
        if self._missing and now >= self._gather_by:
            return f"nothing was heard of {_nodes(self.missing)} within {self._patience_s:g} s"
        silent = [node for node, heard in sorted(self._heard.items()) if now - heard >= self._timeout_s]
        return f"nothing was heard of {_nodes(silent)} for {self._timeout_s:g} s" if silent else ""

    def next_look(self, now: float) -> float:
        """Seconds until `reason_to_end` may have another answer, if nothing is heard before."""
        ends = [self._gather_by] if self._missing else []
        ends += [heard + self._timeout_s for heard in self._heard.values()]
        return max(0.0, min(ends) - now) if ends else self._timeout_s


def _nodes(numbers: Collection[int]) -> str:
    return f"{'node' if len(numbers) == 1 else 'nodes'} {', '.join(map(str, numbers))}"
