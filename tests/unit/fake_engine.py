"""A small engine that fails over for real: two processes that join a cohort, an election, a retained pool, and a port that answers in the end.

    python fake_engine.py --port PORT [--dies-as ROLE] [--hangs-as ROLE] [--hangs-without-server] [--ignores-sigterm]

Each connection to a primary gets one line: the engine's name, its process, and the epoch of its memory.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from gms_core.client import Membership, RetainedPool, Session, connect
from gms_core.errors import GmsError
from gms_core.layout import Identity

LONG_S = 600.0
BEAT_S = 0.05


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--dies-as", default="")
    parser.add_argument("--hangs-as", default="")
    parser.add_argument("--hangs-without-server", action="store_true")
    parser.add_argument("--ignores-sigterm", action="store_true")
    parser.add_argument("--rank-of", default="")
    options, _ = parser.parse_known_args()  # of an engine that it stands for, it takes every option
    if options.rank_of:
        Rank(options.rank_of)
    else:
        Engine(options).run()


def say(words: str) -> None:
    sys.stdout.write(f"{words}\n")
    sys.stdout.flush()


def open_session(name: str) -> Session:
    return connect(socket_path=Path(os.environ["GMS_RUNTIME_DIR"]) / "host.sock", client=f"{os.environ['GMS_ENGINE']} {name}")


class Rank:
    """The second process: it joins, and then it only lives."""

    def __init__(self, cohort: str) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # its parent ends it
        self.membership = Membership.join(open_session("rank 0"), cohort, os.environ["GMS_ENGINE"], "rank 0")
        say("joined")
        while True:
            signal.pause()


class Engine:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.name = os.environ["GMS_ENGINE"]
        self.block = json.loads(os.environ["GMS_FAILOVER"])
        self.cohort = secrets.token_hex(8)
        self.role = "init"
        self.go = threading.Event()
        if self.block.get("autonomous", True):
            self.go.set()

    def run(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN if self.options.ignores_sigterm else lambda *_: self.end())
        say(f"{self.name} starts as {self.cohort} with {os.environ['GMS_FAILOVER']}")
        self.control = self.join("control")
        self.become("init")
        rank = [sys.executable, __file__, "--rank-of", self.cohort]
        self.rank = subprocess.Popen(rank, stdout=subprocess.PIPE, text=True)
        assert self.rank.stdout is not None
        assert self.rank.stdout.readline() == "joined\n"
        threading.Thread(target=self.report, daemon=True).start()
        memory = self.join("memory")
        pool = RetainedPool(memory.session, "kv_cache")
        if pool.plan(Identity({"engine": "fake"}), LONG_S) is None:
            pool.provide(b"plan", [memory.session.welcome.granularity], LONG_S)
        lock = self.join("lock")  # before it says that it stands by: whoever takes the server away waits for that
        self.become("standby")
        self.go.wait()
        try:
            term = lock.elect(self.block.get("lock", "gms:primary").removeprefix("gms:"), LONG_S)
        except GmsError:
            if self.options.hangs_without_server:
                time.sleep(LONG_S)
            raise
        self.become("promoting")
        epoch = pool.hold(LONG_S).epoch
        with socket.create_server(("127.0.0.1", self.options.port), reuse_port=True) as listening:
            self.become("primary")
            say(f"{self.name} serves: term {term}, epoch {epoch}")
            while True:
                connection, _ = listening.accept()
                with connection:
                    connection.sendall(f"{self.name} {os.getpid()} {epoch}\n".encode())

    def join(self, process: str) -> Membership:
        return Membership.join(open_session(process), self.cohort, self.name, process)

    def become(self, role: str) -> None:
        self.role = role
        self.control.report(role)  # type: ignore[arg-type]
        if self.options.dies_as == role:
            say(f"{self.name} dies as {role}")
            os._exit(3)
        if self.options.hangs_as == role:
            time.sleep(LONG_S)

    def report(self) -> None:
        while True:
            try:
                order = self.control.report(self.role)  # type: ignore[arg-type]
            except GmsError as error:
                say(f"{self.name}, {self.role}, has lost its server: {error}")
                if self.role != "primary" and not self.options.hangs_without_server:
                    os._exit(4)
                return
            if order == "promote":
                self.go.set()
            if order == "demote":
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(BEAT_S)

    def end(self) -> None:
        end = self.join("end")
        end.depart(10.0)
        self.rank.kill()
        self.rank.wait()
        say(f"{self.name} has ended")
        os._exit(0)


if __name__ == "__main__":
    main()
