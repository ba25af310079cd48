"""The process of one node's agent: ``python -m gms_core.failover.nodes``, started by the process that began the engine's part on this node.

It is of the cohort, under the name ``agent``, on each server that a rank of this node has named to it (`gms_core.failover.front_end.named`). If it
hangs, it does not beat there, and the server ends what is on this node; the other nodes miss it as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import msgspec

from gms_core.errors import ConfigurationError, ConnectionLost, GmsError, PermissionRefused
from gms_core.failover.front_end.named import be_told
from gms_core.failover.nodes.channel import Channel, accept, connect
from gms_core.failover.nodes.memberships import Memberships
from gms_core.failover.nodes.messages import Beat, Departs, Gathered, Hello, Order, Over, Refused, Said, Stands, Told, Welcome
from gms_core.failover.nodes.secret import read_secret
from gms_core.failover.nodes.together import Together
from gms_core.failover.threads import from_thread
from gms_core.protocol.messages import Role

NAME = "agent"
"""What the process is called in its cohort, and where it is told."""
JOIN = "join"
DEPART = "depart"
STAND = "stand"
"""The calls that it obeys."""
BEATS = 5
"""How many beats there are in the seconds after which a node is lost."""
AGAIN_S = 0.2
"""Seconds between two tries to reach the agent of the first node, which may not have been started."""
MOST_STRANGERS = 256
"""Callers at a time that have not proved yet that they are agents; more are hung up on."""

log = logging.getLogger("gms")


class Agent:
    """One node's agent. All of it is in one event loop."""

    def __init__(self, order: Order, secret: bytes) -> None:
        """Prepare.

        Args:
            order: What the engine has said.
            secret: Of all its agents.
        """
        self._order, self._secret = order, secret
        others = range(1, order.nodes) if order.node == 0 else (0,)
        self._together = Together(others, now=time.monotonic(), patience_s=order.patience_s, timeout_s=order.timeout_s)
        self._strangers = 0
        self._channels: dict[int, Channel] = {}
        self._queues: dict[int, asyncio.Queue[Said]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._memberships = Memberships(NAME, order.timeout_s, BEATS)
        self._is_over = asyncio.get_running_loop().create_future()

    async def run(self) -> Over | None:
        """Go on until the engine has ended in order, or has to end; returns why."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._order.process, self._engine_ended)

        def told_to_depart(grace_s: float) -> None:
            from_thread(loop, lambda: self._told_to_depart(grace_s))()

        def told_to_stand(role: Role, detail: str) -> None:
            loop.call_soon_threadsafe(self._stand, role, detail)

        be_told(NAME, serves=False, calls={JOIN: self._memberships.join, DEPART: told_to_depart, STAND: told_to_stand})
        if self._order.node == 0:
            try:
                server = await asyncio.start_server(self._called, self._order.host, self._order.port)
            except OSError as error:
                where = f"{self._order.host}:{self._order.port}"
                return Over(ConfigurationError.code, f"the agent cannot listen at {where}: {error.strerror or error}")
            self._begin(self._look())
            async with server:
                return await self._ended()
        self._begin(self._call())
        self._begin(self._look())
        return await self._ended()

    async def _ended(self) -> Over | None:
        over: Over | None = await self._is_over
        for channel in self._channels.values():
            channel.close()
        while self._channels:  # whoever listened to one takes note, so that nothing is cancelled
            await asyncio.sleep(0)
        return over

    def _engine_ended(self) -> None:
        """The process that has started this one is gone. In order, others know it; else the end of this process tells them."""
        asyncio.get_running_loop().remove_reader(self._order.process)
        if self._together.is_departing:
            self._end(None)
        else:
            self._end(Over(ConnectionLost.code, f"the process that began {self._order.engine} on node {self._order.node} has ended"))

    async def _told_to_depart(self, grace_s: float) -> None:
        """Come back once the other agents were told: the engine may end sooner than they hear it otherwise."""
        self._depart(grace_s)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._order.timeout_s / 2):
                await asyncio.gather(*(queue.join() for queue in self._queues.values()))

    def _stand(self, role: Role, detail: str) -> None:
        """The engine has this role: it tells the servers of the first node itself, and the others are told by their agents."""
        for queue in self._queues.values():
            queue.put_nowait(Stands(role, detail))

    def _depart(self, grace_s: float, told_by: int | None = None) -> None:
        """The engine ends in order. The servers of this node know it before anything of it ends here, and so do the other nodes."""
        if self._together.is_departing:
            return
        self._together.departs()
        for node, queue in self._queues.items():
            if node != told_by:
                queue.put_nowait(Departs(grace_s))
        self._memberships.depart(grace_s)
        if told_by is not None:
            log.info("%s ends in order, as node %d says", self._order.engine, told_by)
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._order.process, signal.SIGTERM)

    async def _called(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Somebody has called the first node."""
        if self._strangers >= MOST_STRANGERS:
            writer.transport.abort()
            return
        self._strangers += 1
        try:
            channel = await accept(reader, writer, self._secret)
        except GmsError as error:
            log.warning("a caller was not let in: %s", error)
            return
        finally:
            self._strangers -= 1
        with contextlib.closing(channel):
            try:
                async with asyncio.timeout(self._order.timeout_s):
                    hello = _decoded(await channel.receive())
                refusal = self._refusal(hello)
                await channel.send(msgspec.json.encode(Refused(refusal) if refusal else Welcome()))
            except (GmsError, TimeoutError) as error:
                log.warning("a caller has not said who it is: %s", error)
                return
            if refusal:
                log.warning("an agent that calls from %s was refused: %s", channel.peer, refusal)
            elif isinstance(hello, Hello):
                await self._stay(hello.node, channel)

    def _refusal(self, said: Said) -> str:
        if not isinstance(said, Hello):
            return "an agent says first who it is"
        if said.engine != self._order.engine:
            return f"this is the agent of {self._order.engine}, not of {said.engine}"
        if said.nodes != self._order.nodes:
            return f"{self._order.engine} has {self._order.nodes} nodes, not {said.nodes}"
        return self._together.refusal(said.node)

    async def _call(self) -> None:
        """Connect with the first node's agent, as soon as it is there."""
        said = ""
        while not self._together.is_departing:
            try:
                channel = await connect(self._order.host, self._order.port, self._secret)
            except PermissionRefused as error:
                self._end(Over(error.code, error.message, error.hint))
                return
            except (OSError, ConnectionLost) as error:
                if str(error) != said:
                    said = str(error)
                    log.info("waiting for the agent of node 0 at %s:%d: %s", self._order.host, self._order.port, said)
                await asyncio.sleep(AGAIN_S)
                continue
            with contextlib.closing(channel):
                await self._introduce(channel)
            return

    async def _introduce(self, channel: Channel) -> None:
        await channel.send(msgspec.json.encode(Hello(self._order.engine, self._order.node, self._order.nodes)))
        try:
            async with asyncio.timeout(self._order.timeout_s):
                answer = _decoded(await channel.receive())
        except (GmsError, TimeoutError) as error:
            self._end(Over(ConnectionLost.code, f"the agent of node 0 does not answer: {error}"))
            return
        if isinstance(answer, Welcome):
            await self._stay(0, channel)
        else:
            reason = answer.reason if isinstance(answer, Refused) else "it says something else than an agent does"
            self._end(Over(PermissionRefused.code, f"the agent of node 0 refuses node {self._order.node}: {reason}"))

    async def _stay(self, node: int, channel: Channel) -> None:
        """Be connected with a node, until one of both ends."""
        self._together.came(node, time.monotonic())
        queue: asyncio.Queue[Said] = asyncio.Queue()
        self._queues[node], self._channels[node] = queue, channel
        if not self._together.missing:
            log.info("the agents of all %d nodes of %s are there", self._order.nodes, self._order.engine)
            tell(Gathered())
        speaking = asyncio.ensure_future(self._speak(channel, queue))
        try:
            while True:
                said = _decoded(await channel.receive())
                self._together.heard(node, time.monotonic())
                if isinstance(said, Departs):
                    self._depart(said.grace_s, told_by=node)
                elif isinstance(said, Stands):
                    self._memberships.stand(said.role, said.detail)
        except GmsError as error:
            reason = self._together.went(node, error.message)
            if reason:
                self._end(Over(ConnectionLost.code, reason))
        finally:
            speaking.cancel()
            del self._queues[node], self._channels[node]

    async def _speak(self, channel: Channel, queue: asyncio.Queue[Said]) -> None:
        """Say what there is to say, and between that, that this node is there."""
        with contextlib.suppress(ConnectionLost):  # who receives knows it too
            while True:
                try:
                    async with asyncio.timeout(self._order.timeout_s / BEATS):
                        said = await queue.get()
                except TimeoutError:
                    await channel.send(msgspec.json.encode(Beat()))
                else:
                    await channel.send(msgspec.json.encode(said))
                    queue.task_done()

    async def _look(self) -> None:
        """Miss who is silent."""
        while not self._is_over.done():
            now = time.monotonic()
            if reason := self._together.reason_to_end(now):
                self._end(Over(ConnectionLost.code, reason))
            await asyncio.sleep(min(self._together.next_look(now), self._order.timeout_s) + 0.001)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._end(Over(ConnectionLost.code, f"the agent has failed: {error}"))

    def _end(self, over: Over | None) -> None:
        if not self._is_over.done():
            self._is_over.set_result(over)


def main() -> int:
    """Read the order, and carry it out; returns the exit code, which is not 0 if the engine has to end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends with its engine, whoever ends that
    order = msgspec.json.decode(sys.stdin.buffer.readline(), type=Order)

    async def run() -> Over | None:
        return await Agent(order, read_secret(Path(order.secret_file))).run()

    try:
        over = asyncio.run(run())
    except GmsError as error:
        over = Over(error.code, error.message, error.hint)
    if over is None:
        return 0
    log.error("%s ends on node %d: %s", order.engine, order.node, over.sentence)
    tell(over)
    return 1


def tell(told: Told) -> None:
    """Say something to the process that has started this one, if it is there."""
    with contextlib.suppress(OSError):
        os.write(sys.stdout.fileno(), msgspec.json.encode(told) + b"\n")


def _decoded(message: bytes) -> Said:
    try:
        said: Said = msgspec.json.decode(message, type=Said)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise PermissionRefused(f"an agent says what this version does not know: {error}") from error
    return said
