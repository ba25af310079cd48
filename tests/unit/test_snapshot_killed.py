"""A save, and a removal, that are killed at any call that changes something on disks: the snapshots before load, and the next save works."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from gms_core.snapshot.catalogue import entries
from gms_core.snapshot.manifest import BLOCK_BYTES
from gms_core.snapshot.pruning import prune
from gms_core.snapshot.roots import open_roots
from tests.unit.publishing import PAGE, publish
from tests.unit.snapshot_stand_in import loads, roots_in, save_bytes, save_pool

KILLED = """
import os, signal, sys
from pathlib import Path
from gms_core.client import connect
from gms_core.snapshot import registry
from gms_core.snapshot.backends.nixl_agents import library
from gms_core.snapshot.pruning import prune
from gms_core.snapshot.roots import open_roots
from tests.unit.publishing import MODEL
from tests.unit.snapshot_stand_in import save_bytes, save_pool

what, socket = sys.argv[1:]
backend = None
if what == "save-nixl-posix":
    backend = registry.find("nixl-posix")
    library()  # once for all
CALLS = ("open", "mkdir", "write", "pwrite", "fsync", "fdatasync", "ftruncate", "posix_fallocate", "rename", "link", "unlink", "rmdir")


def work():
    if what.startswith("save"):
        with connect(socket_path=Path(socket)) as session, session.acquire("weights", "ro", MODEL, timeout_s=1) as lease:
            # Counted from here on: what is asked of the server before makes no difference to disks.
            lease.map()
            arm()
            save_pool(session, lease, open_roots([Path(path) for path in paths], create=True), backend=backend, resume=what == "save-resume")
    else:
        arm()
        prune(open_roots([Path(path) for path in paths]), "model", keep=1)


def arm():
    left = number

    def wrap(real):
        def call(*args, **kwargs):
            nonlocal left
            left -= real.__name__ != "open" or bool(args[1] & os.O_CREAT)  # what only reads leaves everything as it was
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, wrap(getattr(os, name)))


# A process for each number, without the time that it takes to start one.
for line in sys.stdin:
    number, *paths = line.split()
    number = int(number)
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Killer:
    """Does the same again and again, and is killed each time one call later."""

    def __init__(self, what, socket, roots):
        self.paths = [str(root.path) for root in roots]
        command = [sys.executable, "-c", KILLED, what, str(socket)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def is_killed_at(self, number, paths=()):
        self.process.stdin.write(f"{number} {' '.join(map(str, paths or self.paths))}\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline())
        assert code in (0, -signal.SIGKILL)
        return code != 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait(20)
        self.process.stdout.close()


@pytest.fixture
def folder():
    """In memory: it is the order of calls that counts."""
    with tempfile.TemporaryDirectory(prefix="gms-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as path:
        yield Path(path)


def left_over(folder):
    return [str(path) for path in folder.glob("root*/model/.*")]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("what", ["save", "save-resume", "save-nixl-posix"])
def test_former_snapshot_loads_and_the_next_is_saved_when_a_save_is_killed_at_any_step(server, folder, what):
    roots = roots_in(folder)
    kills = 0
    with server.connect() as session, publish(session, os.urandom(PAGE) + bytes(BLOCK_BYTES), slab=64 * PAGE) as lease:
        former = save_pool(session, lease, roots)
        with Killer(what, server.socket, roots) as killer:
            for number in range(1000):
                killed = killer.is_killed_at(number)
                newest = loads(roots)
                assert newest.id == former.id or newest.version > former.version
                assert newest.id != former.id or killed, "a save that went well is the newest"
                kills += killed
                if not killed:
                    break
                if number % 3 == 0:
                    former = save_pool(session, lease, roots)
                    assert loads(roots) == former
                    assert not left_over(folder)
                    prune(roots, "model", keep=1)
                else:  # what was left is there when the next one is killed
                    former = newest
    assert kills > 30
    assert not [entry for entry in entries(roots) if entry.state == "damaged"]


@pytest.mark.timeout(600)
def test_snapshots_that_stay_load_when_a_removal_is_killed_at_any_step(folder):
    roots = roots_in(folder)
    kills = 0
    with Killer("prune", "", roots) as killer:
        for number in range(1000):
            save_bytes(roots)
            former = save_bytes(roots)
            killed = killer.is_killed_at(number)
            kills += killed
            assert loads(roots) == former
            if not killed:
                break
    assert kills > 10
    assert [entry.version for entry in entries(roots)] == [former.version]
    assert not left_over(folder)


@pytest.mark.timeout(300)
def test_root_is_made_when_whoever_made_it_was_killed(server, folder):
    with server.connect() as session, publish(session, os.urandom(PAGE)) as lease, Killer("save", server.socket, []) as killer:
        for number in range(30):
            paths = [folder / f"{number}-{root}" for root in range(2)]
            assert killer.is_killed_at(number, paths)
            roots = open_roots(paths, create=True)
            assert save_pool(session, lease, roots).version == loads(roots).version
