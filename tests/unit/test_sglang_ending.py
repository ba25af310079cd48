"""An orderly end of SGLang's main process, with SGLang's own part made up: it may come back, or end the process."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from gms_sglang.ending import Ending


class Manager:
    """SGLang's ``TokenizerManager``, as far as it is asked."""

    class signal_handler_class:
        """Takes the signals once the server answers."""

    def __init__(self, done: list[str]) -> None:
        self._done = done
        self.gracefully_exit = False
        self.over = asyncio.Event()

    async def sigterm_watchdog(self) -> None:
        assert self.gracefully_exit
        self._done.append("SGLang's end")
        self.over.set()


async def ended(**further: Any) -> list[str]:
    """What is done once a signal has come, of an engine that serves."""
    done: list[str] = []
    manager = Manager(done)
    for name, value in further.items():
        setattr(manager, name, value)
    server: Any = SimpleNamespace(started=True)
    ending = Ending(server)
    ending.take_signals(lambda: done.append("depart"), lambda: done.append("shut"), lambda: done.append("close"))
    ending.take_signals_of(manager)
    server.handle_exit(15, None)
    async with asyncio.timeout(60.0):
        await manager.over.wait()
    return done


@pytest.mark.parametrize(
    ("further", "expected"),
    [({}, ["depart", "shut", "close", "SGLang's end"]), ({"_server_stop_hook": None}, ["depart", "shut", "SGLang's end"])],
    ids=["it kills the process", "it stops the server"],
)
def test_all_is_told_before_sglang_ends_when_that_comes_back_to_nobody(further: dict[str, Any], expected: list[str]) -> None:
    assert asyncio.run(ended(**further)) == expected
