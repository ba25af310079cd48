"""Servers in this process, one after the other, with one journal and one memory; and a client that comes back to the next one."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from gms_core.layout import Identity
from gms_core.protocol.messages import Hello
from gms_core.protocol.peer import PeerCredentials
from gms_core.quotas import Quota
from gms_core.server.journal import Journal
from gms_core.server.limits import Limits
from gms_core.server.memory import Memory
from gms_core.server.service import Service
from gms_core.server.state import read
from gms_core.vmm.host import HostDriver

PAGE = 4096
MODEL = Identity({"content": "abc"})
LABEL = "the keeper's"


class Client:
    """A client of a service in this process; it can come back to another one."""

    def __init__(self, service: Service, pid: int | None = None, *, uid: int | None = None) -> None:
        self.service = service
        self.pid = os.getpid() if pid is None else pid
        self.uid = os.getuid() if uid is None else uid
        self.replies: list[Any] = []
        self.ended = asyncio.Event()

    async def open(self, hello: Hello | None = None) -> Client:
        peer = PeerCredentials(self.pid, self.uid, 0)
        self.session = await self.service.open(hello or Hello((2, 1)), peer, self.send, lambda: os.pidfd_open(self.pid))
        self.welcome = self.replies[-1]
        return self

    async def come_back(self, service: Service, *, repeats: bool = False) -> Client:
        self.service = service
        return await self.open(Hello((2, 1), resume=self.welcome.token, session=self.welcome.session, repeats=repeats))

    async def send(self, message: Any, _: Any) -> None:
        self.replies.append(message)

    async def ask(self, request: Any) -> Any:
        await self.service.handle(self.session, request, self.ended)
        return self.replies[-1]


class Host:
    """Servers one after the other, with one journal and one memory, which in reality a keeper has."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self._path = folder / "journal"
        self._stack = stack
        self._memory: Memory | None = None
        self._service: Service | None = None

    def next(self, limits: Limits | None = None, quotas: Sequence[Quota] = ()) -> Service:
        """A server that takes over from the last one, which has been killed."""
        limits = limits or Limits()
        if self._service is not None:
            self._service.engines.close()  # a killed server ends nobody, and members here are this very process
            self._service.grace.close()
        journal = self.journal = self._stack.enter_context(contextlib.closing(Journal(self._path)))
        state = read(journal.values, "host", LABEL)
        memory = self._stack.enter_context(contextlib.closing(Memory(HostDriver(256 * PAGE), limits)))
        if self._memory is not None:
            kept = {int(name.split("/")[1]): (os.dup(number), int(name.split("/")[2])) for name, number in self._memory.kept().items()}
            assert kept.keys() >= state.allocations.keys()
            memory.adopt({number: kept[number] for number in state.allocations}, state.about.allocation if state.about else 0)  # type: ignore[misc]
        self._memory = memory
        service = self._service = Service("host", memory, limits, journal, quotas=quotas)
        service.adopt(state, LABEL)
        service.durable.write()
        self._stack.callback(service.stop)
        return service


def run_in_turn(folder: Path, work: Callable[[Host], Awaitable[None]]) -> None:
    """Run a scenario whose journal is in a folder."""

    async def main() -> None:
        with contextlib.ExitStack() as stack:
            await work(Host(folder, stack))

    asyncio.run(main())


async def used(service: Service) -> dict[tuple[str, str], int]:
    """What is used of each quota, by whom and what."""
    return {(one.who, one.resource): one.used for one in (await service.report()).quotas}
