"""Users besides the server's own: who may connect, to whose servers a client connects, and what one user may do to another's engines and memory."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from gms_core.allowed import Allowed, allowed, user_number
from gms_core.cli import gms
from gms_core.client import connect
from gms_core.config import settings
from gms_core.errors import AcquireTimeout, ConfigurationError, InvalidArgument, PermissionRefused
from gms_core.layout import Identity
from gms_core.protocol.messages import (
    Acquire,
    AwaitGeneration,
    BeginMove,
    Commit,
    Done,
    Drop,
    DropGeneration,
    Elect,
    Elected,
    EndMove,
    HandOver,
    Instruct,
    Join,
    Newer,
    Pin,
    Plan,
    Provide,
    ReadGranted,
    Release,
    Rollback,
    RolledBack,
    Unpin,
    WriteGranted,
)
from gms_core.protocol.peer import peer_groups
from gms_core.runtime_dir import ANY_GROUP, check_socket, prepare
from gms_core.server.listener import bound_socket
from tests.unit.server_threads import server_in_thread
from tests.unit.test_cli_serve import serving
from tests.unit.test_quotas import ALICE, BOB, Client, service

GROUP, OTHER_GROUP = 34567, 34568
MODEL = Identity({"content": "abc"})
OVERFLOW = int(Path("/proc/sys/kernel/overflowuid").read_text())

as_root = pytest.mark.skipif(os.getuid() != 0, reason="needs root, to act as other users")

STRANGER = """
import os, sys
from pathlib import Path
from gms_core.client import connect
from gms_core.errors import GmsError
uid, gid, groups = int(sys.argv[2]), int(sys.argv[3]), [int(word) for word in sys.argv[4].split(",") if word]
os.setgroups(groups)
os.setgid(gid)
os.setuid(uid)
try:
    with connect(socket_path=Path(sys.argv[1])) as session:
        print("welcome", len(session.status().sessions))
except GmsError as error:
    print(error.code, error.message)
"""


def act_as(uid: int, gid: int, path: Path, groups: str = "") -> str:
    """What a process of another user is told when it connects."""
    command = [sys.executable, "-c", STRANGER, str(path), str(uid), str(gid), groups]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


@pytest.fixture
def open_parent(runtime_dir: Path) -> Path:
    """A directory that everybody may pass through, as ``/run`` is."""
    runtime_dir.chmod(0o755)
    return runtime_dir


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_users_and_group_are_found_by_name_or_number() -> None:
    assert allowed([]) == Allowed()
    assert allowed(["1000", f":{GROUP}"]) == Allowed(frozenset({1000}), GROUP, GROUP)
    assert allowed(["root"]).users == {0}
    assert allowed([":root"]).group == 0
    assert allowed(allowed(["1000", f":{GROUP}"]).words) == allowed(["1000", f":{GROUP}"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nobody-of-this-name"], "there is no user"),
        ([":no-such-group"], "there is no group"),
        ([":1", ":2"], "only one group"),
        ([str(2**32 - 1)], "cannot be the number"),
        ([str(OVERFLOW)], "no number in this user namespace"),
        (["4123456"], "the group of user 4123456 is not known here"),
    ],
)
def test_allowed_is_refused_with_a_sentence_when_it_cannot_be(words: list[str], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        allowed(words)
    result = CliRunner().invoke(gms, ["serve", "--device", "host", *(word for one in words for word in ("--allow", one))])
    assert result.exit_code == 2


def test_only_those_are_admitted_who_are_named() -> None:
    admitted = Allowed(frozenset({ALICE}), GROUP, GROUP)
    assert [admitted.admits(uid, groups, 7) for uid, groups in [(0, ()), (7, ()), (ALICE, ()), (BOB, {GROUP})]] == [True] * 4
    assert not admitted.admits(BOB, {OTHER_GROUP, 0}, 7)
    assert not Allowed().admits(BOB, {GROUP, 0}, 7)


def test_groups_are_the_kernels_when_a_peer_connects() -> None:
    first, second = socket.socketpair()
    with first, second:
        assert peer_groups(first) == {os.getgid(), *os.getgroups()}


@as_root
def test_directory_and_socket_are_the_groups_when_one_is_allowed(open_parent: Path) -> None:
    before = os.umask(0o777)
    try:
        directory = prepare(open_parent / "run", GROUP)
        with server_in_thread(directory, admitted=allowed([f":{GROUP}"])) as path:
            assert (mode_of(directory), directory.stat().st_gid, directory.stat().st_uid) == (0o710, GROUP, os.getuid())
            assert (mode_of(path), path.stat().st_gid, path.stat().st_uid) == (0o660, GROUP, os.getuid())
            assert mode_of(path.with_suffix(".lock")) == 0o600
    finally:
        os.umask(before)


@as_root
def test_members_and_named_users_get_in_and_nobody_else(open_parent: Path) -> None:
    directory = prepare(open_parent / "run", GROUP)
    with server_in_thread(directory, admitted=Allowed(frozenset({ALICE}), None, GROUP)) as path:
        assert act_as(ALICE, GROUP, path).startswith("welcome")
        assert act_as(ALICE, OTHER_GROUP, path, str(GROUP)).startswith("welcome")
        assert act_as(BOB, GROUP, path) == f"permission user {BOB} may not use this server"
        assert act_as(BOB, OTHER_GROUP, path).startswith("permission")
        assert act_as(ALICE, GROUP, path) == "welcome 1", "whoever was refused cost nothing but its own connection"
    with server_in_thread(directory, admitted=Allowed(frozenset(), GROUP, GROUP)) as path:
        assert act_as(BOB, OTHER_GROUP, path, str(GROUP)).startswith("welcome")


@as_root
@pytest.mark.parametrize("mode", [0o770, 0o730, 0o711, 0o755, 0o700])
def test_directory_is_refused_when_its_group_may_do_more_or_less_than_enter(open_parent: Path, mode: int) -> None:
    directory = open_parent / "run"
    directory.mkdir()
    os.chown(directory, -1, GROUP)
    directory.chmod(mode)
    with pytest.raises(PermissionRefused, match="chmod 710"):
        prepare(directory, GROUP)
    assert mode_of(directory) == mode


@as_root
def test_directory_is_taken_as_it_is_when_only_its_group_may_enter(open_parent: Path) -> None:
    directory = prepare(open_parent / "run", GROUP)
    assert prepare(directory, GROUP) == prepare(directory, ANY_GROUP) == directory
    with pytest.raises(PermissionRefused, match=f"group {OTHER_GROUP} may not enter"):
        prepare(directory, OTHER_GROUP)
    with pytest.raises(PermissionRefused, match="chmod 700"):
        prepare(directory)
    directory.chmod(0o750)
    assert prepare(directory, GROUP) == directory


@as_root
def test_nothing_is_left_when_the_directory_cannot_be_given_to_the_group(open_parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chown", refuse)
    with pytest.raises(PermissionRefused, match="cannot be made"):
        prepare(open_parent / "run", GROUP)
    assert not (open_parent / "run").exists()


@pytest.fixture
def group_socket(open_parent: Path) -> Iterator[Path]:
    directory = prepare(open_parent / "run", GROUP)
    with bound_socket(directory / "host.sock", GROUP):
        yield directory / "host.sock"


@as_root
def test_client_refuses_a_socket_when_others_could_replace_it_or_connect_to_it(group_socket: Path) -> None:
    check_socket(group_socket)
    for mode, right in ((0o770, 0o710), (0o730, 0o710), (0o777, 0o710)):
        group_socket.parent.chmod(mode)
        with pytest.raises(PermissionRefused, match="in the place of"):
            check_socket(group_socket)
        group_socket.parent.chmod(right)
    for mode in (0o666, 0o664, 0o670, 0o640):
        group_socket.chmod(mode)
        with pytest.raises(PermissionRefused, match="others may connect"):
            check_socket(group_socket)
    group_socket.chmod(0o660)
    os.chown(group_socket, -1, OTHER_GROUP)
    with pytest.raises(PermissionRefused, match="others may connect"):
        check_socket(group_socket)


@as_root
def test_client_trusts_another_users_server_only_when_it_is_told_to(group_socket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (group_socket, group_socket.parent):
        os.chown(path, ALICE, -1)
    with pytest.raises(PermissionRefused, match=f"belongs to user {ALICE}") as refused:
        check_socket(group_socket)
    assert "GMS_SERVER_USER" in refused.value.hint
    monkeypatch.setenv("GMS_SERVER_USER", str(ALICE))
    check_socket(group_socket)
    monkeypatch.setenv("GMS_SERVER_USER", str(BOB))
    with pytest.raises(PermissionRefused, match="which GMS_SERVER_USER names"):
        check_socket(group_socket)
    monkeypatch.setenv("GMS_SERVER_USER", str(ALICE))
    os.chown(group_socket.parent, BOB, -1)
    with pytest.raises(PermissionRefused, match="in the place of"):
        check_socket(group_socket)


@as_root
def test_socket_is_refused_when_a_member_of_the_group_planted_it(open_parent: Path) -> None:
    """Where the directory was made writable for the group, a member can put its own socket there."""
    directory = prepare(open_parent / "run", GROUP)
    planted = directory / "host.sock"
    with socket.socket(socket.AF_UNIX) as trap:
        trap.bind(os.fspath(planted))
        trap.listen()
        planted.chmod(0o660)
        os.chown(planted, ALICE, GROUP)
        assert act_as(BOB, GROUP, planted).startswith(f"permission {planted} belongs to user {ALICE}")


@pytest.mark.parametrize("value", ["nobody-of-this-name", str(OVERFLOW), "-1"])
def test_server_user_is_refused_when_it_cannot_be_trusted(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GMS_SERVER_USER", value)
    with pytest.raises(ConfigurationError, match="GMS_SERVER_USER"):
        settings()


def test_number_is_given_when_a_user_is_named() -> None:
    assert user_number("root") == 0


async def _refused(client: Client, request: Any) -> str:
    with pytest.raises(PermissionRefused) as refused:
        await client.ask(request)
    return refused.value.message


def test_weights_of_another_user_are_read_and_not_written_over() -> None:
    async def scenario() -> None:
        with service() as serving:
            alice, bob, root = [await Client(serving, uid).open() for uid in (ALICE, BOB, 0)]
            await alice.publish("weights", 1)
            assert f"by user {ALICE} alone" in await _refused(bob, Acquire("weights", "rw", MODEL, 0))
            assert isinstance(await bob.ask(Acquire("weights", "ro", MODEL, 0)), ReadGranted)
            await bob.publish("weights-of-bob", 1)
            await alice.ask(Release("weights"))
            assert await alice.publish("weights", 1) == 2
            assert await root.publish("weights", 1) == 3

    asyncio.run(scenario())


def test_commit_is_refused_when_another_user_has_published_since_the_writer_asked() -> None:
    async def scenario() -> None:
        with service() as serving:
            alice, bob = [await Client(serving, uid).open() for uid in (ALICE, BOB)]
            await bob.ask(Acquire("weights", "rw", MODEL, 0))
            serving.accounts.committed(ALICE, "weights", 1)
            await bob.ask(Commit("weights", (), b"", MODEL))  # a draft is its writer's, whoever had the number before
            assert f"by user {BOB} alone" in await _refused(alice, Acquire("weights", "rw", MODEL, 0))

    asyncio.run(scenario())


def test_generations_of_another_user_are_read_and_not_kept_freed_or_brought_back() -> None:
    async def scenario() -> None:
        with service() as serving:
            alice, bob, root = [await Client(serving, uid).open() for uid in (ALICE, BOB, 0)]
            await alice.publish("weights", 1, pin=True)
            assert isinstance(await bob.ask(Acquire("weights", "ro", MODEL, 0)), ReadGranted)
            await alice.ask(Release("weights"))
            await alice.publish("weights", 1)
            await alice.ask(Release("weights"))
            for request in (Pin("weights", 2), Unpin("weights", 1), DropGeneration("weights", 2), Rollback("weights", 1, 2)):
                assert f"by user {ALICE} alone" in await _refused(bob, request)
            assert isinstance(await bob.ask(AwaitGeneration("weights", 1, 0)), Newer)
            assert isinstance(await bob.ask(BeginMove("weights", MODEL)), ReadGranted)
            assert isinstance(await bob.ask(EndMove("weights", 2)), Done)
            await bob.ask(Release("weights"))
            assert isinstance(await root.ask(Rollback("weights", 1, 2)), RolledBack)
            assert isinstance(await alice.ask(Pin("weights", 3)), Done), "what an operator brings back is still its maker's"
            await alice.ask(Unpin("weights", 3))
            await alice.ask(DropGeneration("weights", 3))
            assert f"by user {ALICE} alone" in await _refused(bob, Acquire("weights", "rw", MODEL, 0)), "her pinned one is still there"
            assert f"by user {ALICE} alone" in await _refused(bob, Unpin("weights", 1))
            await alice.ask(Unpin("weights", 1))
            assert await bob.publish("weights", 1) == 4

    asyncio.run(scenario())


def test_first_to_come_waits_when_what_is_kept_is_another_users() -> None:
    async def scenario() -> None:
        with service() as serving:
            alice, bob, root = [await Client(serving, uid).open() for uid in (ALICE, BOB, 0)]
            await alice.publish("weights", 1, pin=True)
            await alice.ask(Release("weights"))
            await alice.publish("weights", 1)
            await alice.ask(Release("weights"))
            await alice.ask(DropGeneration("weights", 2))
            with pytest.raises(AcquireTimeout, match=f"by user {ALICE} alone"):
                await bob.ask(Acquire("weights", "auto", MODEL, 0))
            waiting = asyncio.ensure_future(bob.ask(Acquire("weights", "auto", MODEL, 60)))
            while not bob.session.waiting_for:
                await asyncio.sleep(0)
            await alice.ask(Rollback("weights", 1, 0))
            assert (await waiting).layout.generation == 3
            await bob.ask(Release("weights"))
            await alice.ask(DropGeneration("weights", 3))
            assert isinstance(await root.ask(Acquire("weights", "auto", MODEL, 0)), WriteGranted)

    asyncio.run(scenario())


def test_who_waits_for_a_writer_does_not_write_after_it_what_is_another_users() -> None:
    async def scenario() -> None:
        with service() as serving:
            alice, second, bob = [await Client(serving, uid).open() for uid in (ALICE, ALICE, BOB)]
            await alice.publish("weights", 1, pin=True)
            await alice.ask(Release("weights"))
            await alice.publish("weights", 1)
            await alice.ask(Release("weights"))
            await alice.ask(DropGeneration("weights", 2))
            await alice.ask(Acquire("weights", "auto", MODEL, 0))
            bobs = asyncio.ensure_future(bob.ask(Acquire("weights", "auto", MODEL, 60)))
            alices = asyncio.ensure_future(second.ask(Acquire("weights", "rw", MODEL, 60)))
            while not (bob.session.waiting_for and second.session.waiting_for):
                await asyncio.sleep(0)
            serving.close(alice.session)
            assert isinstance(await alices, WriteGranted)
            await second.ask(Commit("weights", (), b"", MODEL))
            assert isinstance(await bobs, ReadGranted)

    asyncio.run(scenario())


def test_writer_is_refused_when_the_pool_has_become_another_users() -> None:
    async def scenario() -> None:
        with service() as serving:
            writing, waiting, root = [await Client(serving, uid).open() for uid in (ALICE, ALICE, 0)]
            for client in (writing, root):
                await client.publish("weights", 1, pin=True)
                await client.ask(Release("weights"))
            await root.ask(Rollback("weights", 1, 2))
            await writing.ask(Acquire("weights", "rw", MODEL, 0, renumbers=True))
            queued = asyncio.ensure_future(waiting.ask(Acquire("weights", "rw", MODEL, 60)))
            while not waiting.session.waiting_for:
                await asyncio.sleep(0)
            await root.ask(Rollback("weights", 2, 3))
            assert "by user 0 alone" in await _refused(writing, Commit("weights", (), b"", MODEL))
            await writing.ask(Release("weights"))
            with pytest.raises(PermissionRefused, match="by user 0 alone"):
                await queued

    asyncio.run(scenario())


def test_user_writes_one_generation_after_the_other_when_the_next_request_waits_already() -> None:
    async def scenario() -> None:
        with service() as serving:
            first, second = [await Client(serving, ALICE).open() for _ in range(2)]
            await first.ask(Acquire("weights", "rw", MODEL, 0))
            waiting = asyncio.ensure_future(second.ask(Acquire("weights", "rw", MODEL, 60)))
            while not second.session.waiting_for:
                await asyncio.sleep(0)
            await first.ask(Commit("weights", (), b"", MODEL))
            assert await waiting == WriteGranted("weights", 2)

    asyncio.run(scenario())


def test_rollback_to_what_another_user_has_made_is_refused_in_ones_own_pool() -> None:
    async def scenario() -> None:
        with service() as serving:
            alice, bob, root = [await Client(serving, uid).open() for uid in (ALICE, BOB, 0)]
            for client in (alice, root):
                await client.publish("weights", 1, pin=True)
                await client.ask(Release("weights"))
            assert "by user 0 alone" in await _refused(alice, Rollback("weights", 1, 2))
            await root.ask(Rollback("weights", 1, 2))
            assert "by user 0 alone" in await _refused(alice, Rollback("weights", 2, 3))
            assert "by user 0 alone" in await _refused(alice, Unpin("weights", 2))
            assert f"by user {ALICE} alone" in await _refused(bob, Rollback("weights", 2, 3))
            assert await alice.publish("weights", 1) == 4

    asyncio.run(scenario())


def test_engines_of_another_user_are_left_alone() -> None:
    async def scenario() -> None:
        with service() as serving:
            alice, bob, root = [await Client(serving, uid).open() for uid in (ALICE, BOB, 0)]
            await alice.ask(Join("cohort", "engine", "rank 0"))
            await alice.ask(Plan("kv", MODEL, 0))
            await bob.ask(Join("other", "engine of bob", "rank 0"))
            assert "may be used by user" in await _refused(bob, Plan("kv", MODEL, 0))
            await alice.ask(Provide("kv", b"plan", (4096,), 0.0))
            assert isinstance(await alice.ask(Elect("primary", 0)), Elected)
            for request in (
                Join("cohort", "engine", "rank 1"),
                Instruct("cohort", "demote"),
                Plan("kv", MODEL, 0),
                Drop("kv"),
                Elect("primary", 0),
                HandOver(),
            ):
                assert f"user {BOB}" in await _refused(bob, request)
            counted = {(one.request, one.outcome): one.count for one in serving.observer.observation(0).requests}
            assert (counted["plan", "permission"], counted["elect", "permission"], counted["elect", "ok"]) == (2, 1, 1)
            assert isinstance(await bob.ask(Elect("primary-of-bob", 0)), Elected)
            await root.ask(Instruct("cohort", "promote"))
            serving.engines.close()

    asyncio.run(scenario())


RESIDENT = """
import os, sys
from pathlib import Path
from gms_core.client import connect
from gms_core.layout import Identity
import gms_core.client.watch, gms_core.vmm.host
os.setgroups([])
os.setgid(int(sys.argv[3]))
os.setuid(int(sys.argv[2]))
with connect(socket_path=Path(sys.argv[1])) as session:
    lease = session.acquire("weights", "rw", Identity({"content": "abc"}), timeout_s=10, slab_bytes=4096)
    lease.arena.allocate(4096)
    print(session.welcome.session, flush=True)
    sys.stdin.readline()
    read = lease.commit(b"", Identity({"content": "abc"}))
    print(read.layout.generation, session.welcome.session, flush=True)
    read.release()
"""


@as_root
def test_allowed_user_publishes_and_goes_on_when_the_server_is_killed_meanwhile(open_parent: Path) -> None:
    directory = open_parent / "run"
    path, owner_of = directory / "host.sock", directory / "host.lock"
    with serving(directory, "--allow", f":{GROUP}", "--quota", f"user={ALICE},bytes=8KiB") as server:
        assert (mode_of(directory), mode_of(path), path.stat().st_gid) == (0o710, 0o660, GROUP)
        command = [sys.executable, "-c", RESIDENT, str(path), str(ALICE), str(GROUP)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as resident:
            assert resident.stdin is not None
            assert resident.stdout is not None
            number = resident.stdout.readline().strip()
            os.kill(int(owner_of.read_text()), signal.SIGKILL)
            assert server.stdout is not None
            assert "ready" in server.stdout.readline()
            assert (mode_of(path), path.stat().st_gid) == (0o660, GROUP)
            resident.stdin.write("go on\n")
            resident.stdin.close()
            assert resident.stdout.readline().split() == ["1", number]
        with connect(socket_path=path) as session:
            (told,) = session.status().quotas
            assert (told.who, told.used) == (str(ALICE), 4096)
        assert act_as(BOB, OTHER_GROUP, path).startswith("permission")
        assert {mode_of(one) for one in directory.iterdir() if one != path} == {0o600}
