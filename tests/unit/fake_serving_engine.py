"""An engine that speaks the completions API, and does with GMS what a real one does: several processes, an election, a pool, a shared port.

    python fake_serving_engine.py --port PORT [--loads-for SECONDS] [--lies-in-term TERM] [--claims-to-serve] [--fails] [--fails-beside-a-primary]

Without ``GMS_FAILOVER`` it is the same engine without GMS, and serves at once.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from gms_core.client import Membership, RetainedPool, Session, connect
from gms_core.layout import Identity

LONG_S = 600.0
BEAT_S = 0.05
TOKEN_S = 0.002
MODEL = "fake"


class Server(ThreadingHTTPServer):
    allow_reuse_port = True
    daemon_threads = True
    lies = False

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", port), Handler, bind_and_activate=False)
        self.server_bind()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer({"data": [{"id": MODEL}]})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert request["model"] == MODEL
        assert request["ignore_eos"]
        tokens = [(sum(request["prompt"]) * 31 + place * 7 + self.server.lies) % 1000 for place in range(request["max_tokens"])]
        if not request["stream"]:
            time.sleep(TOKEN_S * len(tokens))
            self.answer({"choices": [{"text": "", "token_ids": tokens}]})
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for token in tokens:
            time.sleep(TOKEN_S)
            self.piece(json.dumps({"choices": [{"text": "", "token_ids": [token]}]}))
        self.piece("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def piece(self, text: str) -> None:
        data = f"data: {text}\n\n".encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def answer(self, document: object) -> None:
        data = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def open_session(name: str) -> Session:
    return connect(socket_path=Path(os.environ["GMS_RUNTIME_DIR"]) / "host.sock", client=f"{os.environ['GMS_ENGINE']} {name}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--loads-for", type=float, default=0.0)
    parser.add_argument("--lies-in-term", type=int, default=0)
    parser.add_argument("--claims-to-serve", action="store_true")
    parser.add_argument("--fails", action="store_true")
    parser.add_argument("--fails-beside-a-primary", action="store_true")
    parser.add_argument("--part", default="")
    parser.add_argument("--cohort", default="")
    options = parser.parse_args()
    if options.part:
        part(options.part, options.cohort)
    elif options.fails:
        sys.exit("there is no such model")
    elif os.environ.get("GMS_FAILOVER"):
        Engine(options).run()
    else:
        time.sleep(options.loads_for)
        server = Server(options.port)
        server.server_activate()
        server.serve_forever()


def part(name: str, cohort: str) -> None:
    """A process that joins, and then only lives until its engine's first one ends."""
    membership = Membership.join(open_session(name), cohort, os.environ["GMS_ENGINE"], name)
    say("joined")
    sys.stdin.read()
    del membership


class Engine:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.name = os.environ["GMS_ENGINE"]
        self.cohort = secrets.token_hex(8)
        self.role = "init"

    def run(self) -> None:
        server = Server(self.options.port)
        self.control = self.join("api-server 0 (control)")
        if self.options.fails_beside_a_primary and len(self.control.session.status().cohorts) > 1:
            say("there is no room beside a primary")
            sys.stdout.flush()
            self.control.depart(10.0)
            os._exit(1)
        self.report()
        parts = [self.start(name) for name in ("engine-core", "rank 0")]
        threading.Thread(target=self.keep_reporting, daemon=True).start()
        memory = self.memory = self.join("api-server 0")
        pool = RetainedPool(memory.session, "kv_cache")
        if pool.plan(Identity({"engine": "fake"}), LONG_S) is None:
            pool.provide(b"plan", [memory.session.welcome.granularity], LONG_S)
        self.role = "standby"
        self.report()
        if self.options.claims_to_serve:
            self.role = "primary"
            self.report()
        self.lock = self.join("api-server 0 (lock)")
        term = self.lock.elect("primary", LONG_S)
        elected_at, elected = time.time(), time.monotonic()
        self.role = "promoting"
        self.report()
        epoch = pool.hold(LONG_S).epoch
        held_ms = 1000 * (time.monotonic() - elected)
        self.role = "primary"
        self.report()
        server.lies = term == self.options.lies_in_term
        server.server_activate()
        listening_ms = 1000 * (time.monotonic() - elected)
        say(
            f"{self.name} serves [gms event=promoted engine={self.name} term={term} epoch={epoch} elected_at={elected_at:.6f} "
            f"elected_clock_s={elected:.6f} held_ms={held_ms:.3f} mapped_ms={held_ms:.3f} promoted_ms={held_ms:.3f} listening_ms={listening_ms:.3f}]"
        )
        server.serve_forever()
        del parts

    def start(self, name: str) -> subprocess.Popen[str]:
        command = [sys.executable, __file__, "--part", name, "--cohort", self.cohort]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "joined\n"
        return process

    def join(self, process: str) -> Membership:
        return Membership.join(open_session(process), self.cohort, self.name, process, serves=process.startswith("api"))

    def report(self) -> None:
        self.control.report(self.role)  # type: ignore[arg-type]

    def keep_reporting(self) -> None:
        while True:
            self.report()
            time.sleep(BEAT_S)


if __name__ == "__main__":
    main()
