"""Transfer backends that never end by themselves, or do not end as they should, as plugins: what goes on meanwhile can be looked at."""

SOURCE = '''
import os
import threading
import time
from pathlib import Path

from gms_core.errors import TransferCancelled, TransferFailed
from gms_core.plugins.hookspecs import hookimpl
from gms_core.snapshot.transfer import Probe


class Stuck:
    """Leaves a file with its process's number in the directory of the option ``mark``. With ``fail``, the lower one of two fails."""

    name = "stuck"
    directions = frozenset({"save", "restore"})

    def probe(self):
        return Probe(True, "")

    def check(self, job):
        pass

    def open(self, job, memory):
        mark = Path(job.options["mark"])
        (mark / str(os.getpid())).touch()
        return Transfer(mark, "fail" in job.options)


class Transfer:
    def __init__(self, mark, fails):
        self.mark, self.fails, self.ended = mark, fails, threading.Event()

    def poll(self):
        return 1

    def cancel(self):
        self.ended.set()

    def finish(self):
        while not self.ended.wait(0.01):
            marks = [int(path.name) for path in self.mark.iterdir()]
            if self.fails and len(marks) == 2 and min(marks) == os.getpid():
                raise TransferFailed("the disk burns")
        raise TransferCancelled("it was cancelled")


@hookimpl
def gms_transfer_backends():
    return [Stuck()]
'''

SLOW = '''
import os
import time
from dataclasses import replace
from pathlib import Path

from gms_core.client import WriteLease
from gms_core.plugins.hookspecs import hookimpl
from gms_core.snapshot.backends.preadv import STAGED
from gms_core.snapshot.transfer import Probe

commit = WriteLease.commit


class Slow:
    """Moves bytes at once, and publishes only when there is a file "go" in the directory of the option ``mark``; one that publishes leaves a file."""

    name = "stuck"
    directions = frozenset({"restore"})

    def probe(self):
        return Probe(True, "")

    def check(self, job):
        pass

    def open(self, job, memory):
        mark = Path(job.options["mark"])

        def late(lease, *arguments, **options):
            (mark / str(os.getpid())).touch()
            while not (mark / "go").exists():
                time.sleep(0.01)
            return commit(lease, *arguments, **options)

        WriteLease.commit = late
        return STAGED.open(replace(job, options={}), memory)


@hookimpl
def gms_transfer_backends():
    return [Slow()]
'''
FAULTY = """
import os

from gms_core.plugins.hookspecs import hookimpl
from gms_core.snapshot.transfer import Probe


class Faulty:
    name = "stuck"
    directions = frozenset({"save"})

    def probe(self):
        return Probe(True, "")

    def check(self, job):
        pass

    def open(self, job, memory):
        if "leave" in job.options:
            os._exit(3)
        raise ValueError("no such thing")


@hookimpl
def gms_transfer_backends():
    return [Faulty()]
"""

ENDLESS = '''
import os
from dataclasses import replace
from pathlib import Path

from gms_core.plugins.hookspecs import hookimpl
from gms_core.snapshot import registry
from gms_core.snapshot.backends.nixl_agents import Agent
from gms_core.snapshot.transfer import Probe

plain = Agent.begin


class Endless:
    """NIXL by the backend of the option ``with``, and nothing that it has begun ever ends. A process that has begun something leaves a file."""

    name = "stuck"
    directions = frozenset({"save", "restore"})

    def probe(self):
        return Probe(True, "")

    def check(self, job):
        pass

    def open(self, job, memory):
        options = dict(job.options)
        mark, backend = Path(options.pop("mark")), registry.find(options.pop("with"))

        def begin(agent, *arguments):
            handle = plain(agent, *arguments)
            (mark / str(os.getpid())).touch()
            return handle

        Agent.begin, Agent.has_ended = begin, lambda agent, handle: False
        return backend.open(replace(job, options=options), memory)


@hookimpl
def gms_transfer_backends():
    return [Endless()]
'''
