"""What ``gms bench failover`` measures: a primary is killed again and again while requests flow, beside the restart that a failover replaces."""

from __future__ import annotations

import contextlib
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import msgspec

from gms_core import __version__
from gms_core.cli.failover_benchmark_client import Endpoint, FirstAnswer, Tokens, check_unused, complete, first_answer, model_name, prompt
from gms_core.cli.failover_benchmark_fleet import RUN_LOG, Fleet, Lookout, kill, kinds
from gms_core.cli.failover_benchmark_load import Load, Task, load
from gms_core.cli.failover_benchmark_restart import restart
from gms_core.cli.failover_benchmark_result import INTERRUPTED, Failover, Kind, Requests, Restart, Result, differences
from gms_core.devices import HOST, list_gpus
from gms_core.errors import AcquireTimeout, DriverUnavailable, EngineFailed, GmsError, InvalidArgument
from gms_core.fleet.engines import Engine

Tell = Callable[[str], None]

COMPARED = 3
"""Prompts whose tokens are compared after each kill, one at a time: the numbers of a batch depend on what else is in it."""
FIRST_PROMPT = 0
"""Number of the prompt of the first request after a kill; the ones that are compared follow."""
LONGEST_FLOW_S = 0.5
"""Requests flow for a random time up to this before a kill, so that it hits them anywhere."""
AFTERWARDS_S = 60.0
"""Seconds that a dead engine may take to be gone."""
LOG_S = 10.0
"""Seconds that the line of a promotion may take to be in the log. Without it, what it tells is not in the result."""
KILLS = "kills.jsonl"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to measure.

    Attributes:
        command: Starts one engine; with GMS, what that needs is added.
        restart_command: Starts the engine without GMS.
        endpoint: Where engines answer.
        kills: How often to kill.
        kill: What of the primary; None for something else each time.
        load: Requests in flight.
        shadows: Engines that stand by. Kills follow one another until none does; then it is waited for all of them again.
        restarts: Lives of the engine without GMS to measure: ``cold`` before all others, ``warm`` after them.
        prompt_tokens: Of each request.
        new_tokens: Of each request.
        seed: Of the prompts and of everything random.
        devices: Whose servers to start; empty for all GPUs, or ``host`` without one.
        log_dir: Where the output of all processes goes; None for nowhere.
        patience_s: Seconds that an engine gets to become ready.
    """

    command: tuple[str, ...]
    restart_command: tuple[str, ...]
    endpoint: Endpoint
    kills: int = 20
    kill: Kind | None = "group"
    load: int = 8
    shadows: int = 1
    restarts: tuple[str, ...] = ("cold", "warm")
    prompt_tokens: int = 32
    new_tokens: int = 64
    seed: int = 0
    devices: tuple[str, ...] = ()
    log_dir: Path | None = None
    patience_s: float = 900.0


def measure(wanted: Wanted, tell: Tell) -> Result:
    """Run everything: the cold restart, the kills, the warm restart.

    Args:
        wanted: What to measure.
        tell: Called with what is being done.

    Raises:
        GmsError: Something could not be started, or did not become ready, before there was a first figure. Afterwards the result tells of it, as of
            wrong tokens and of a second primary.
    """
    check_unused(wanted.endpoint)
    with tempfile.TemporaryDirectory(prefix="gms-bench-") as directory:
        log_dir = wanted.log_dir or Path(directory) / "logs"
        _make(log_dir)
        try:
            return _Benchmark(wanted, tell, log_dir).run(Path(directory) / "run")
        except GmsError as error:
            if wanted.log_dir is None:
                error.add_hint("The logs are gone; keep them with --log-dir.")
            raise


def _make(log_dir: Path) -> None:
    try:
        log_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in (KILLS, RUN_LOG):  # of an earlier run
            (log_dir / name).unlink(missing_ok=True)
    except OSError as error:
        raise InvalidArgument(f"{log_dir} cannot be used for logs: {error.strerror}", hint="Name another directory with --log-dir.") from error


class _Benchmark:
    def __init__(self, wanted: Wanted, tell: Tell, log_dir: Path) -> None:
        self._wanted, self._tell, self._log_dir = wanted, tell, log_dir
        self._choice = random.Random(wanted.seed)  # noqa: S311 - to be repeated, not to be secret
        self._words = [prompt(wanted.seed, FIRST_PROMPT + number, wanted.prompt_tokens) for number in range(1 + COMPARED)]
        self._model: str | None = None
        self._restarts: dict[str, Restart] = {}
        self._without_gms: list[Tokens] | None = None
        self._failovers: list[Failover] = []
        self._right: list[Tokens] | None = None
        self._keeps = True

    def run(self, runtime_dir: Path) -> Result:
        wanted, lookout = self._wanted, Lookout(runtime_dir)
        ended_by = ""
        try:
            self._restart("cold")
            with lookout, Fleet(wanted.command, wanted.shadows, wanted.devices or _default_devices(), runtime_dir, self._log_dir) as fleet:
                self._fail_over(fleet, lookout)
            self._restart("warm")
        except (KeyboardInterrupt, GmsError) as error:
            if not self._failovers:
                raise
            ended_by = error.message if isinstance(error, GmsError) else INTERRUPTED
        return Result(
            gms=__version__,
            devices=lookout.devices,
            command=wanted.command,
            restart_command=wanted.restart_command if wanted.restarts else (),
            kills=wanted.kills,
            kill=wanted.kill or "mixed",
            shadows=wanted.shadows,
            load=wanted.load,
            prompt_tokens=wanted.prompt_tokens,
            new_tokens=wanted.new_tokens,
            seed=wanted.seed,
            restarts=self._restarts,
            failovers=tuple(self._failovers),
            max_primaries=lookout.max_primaries,
            stock_tokens_equal=None if self._without_gms is None or self._right is None else self._without_gms == self._right,
            ended_by=ended_by,
        )

    def _name(self) -> str | None:
        """The model's name, asked for until it is known."""
        self._model = self._model or model_name(self._wanted.endpoint)
        return self._model

    def _restart(self, which: str) -> None:
        if which not in self._wanted.restarts:
            return
        self._tell(f"restart without GMS, {which}")
        wanted, log = self._wanted, self._log_dir / f"restart-{which}.log"
        self._restarts[which], self._without_gms = restart(
            wanted.restart_command, log, wanted.endpoint, self._name, self._words[0], wanted.patience_s, self._ask
        )

    def _ask(self) -> list[Tokens]:
        """Tokens for the prompts that are compared; none where there was no answer."""
        asked = (complete(self._wanted.endpoint, self._name() or "", words, self._wanted.new_tokens) for words in self._words[1:])
        return [answer.tokens if answer.outcome == "answered" else () for answer in asked]

    def _first_answer(self, check: Callable[[], None]) -> FirstAnswer:
        return first_answer(self._wanted.endpoint, self._name, self._words[0], patience_s=self._wanted.patience_s, check=check)

    def _fail_over(self, fleet: Fleet, lookout: Lookout) -> None:
        """Kill as often as is wanted, as long as there are no two primaries."""
        self._tell("starting engines")
        if not self._wait_until_ready(fleet, lookout, self._wanted.shadows):
            return
        self._right = [self._first_answer(fleet.check).tokens, *self._ask()]
        if not all(self._right):
            raise EngineFailed("the first engine does not answer", hint="Do --prompt-tokens and --new-tokens fit into the engine's context?")
        with self._load() as flow:
            for number in range(1, self._wanted.kills + 1):
                self._tell(f"kill {number} of {self._wanted.kills}: waiting for a shadow")
                none_left = (number - 1) % self._wanted.shadows == 0
                if not self._wait_until_ready(fleet, lookout, self._wanted.shadows if none_left else 1):
                    break
                lookout.close = True
                found = self._kill(number, fleet, lookout, flow, self._right)
                lookout.close = False
                self._failovers.append(found)
                self._keep(found)

    def _keep(self, found: Failover) -> None:
        """Append a kill's result to a file. If that fails, the result still has it, and the file gets no more."""
        if not self._keeps:
            return
        path = self._log_dir / KILLS
        try:
            with path.open("ab") as file:
                file.write(msgspec.json.encode(found) + b"\n")
        except OSError as error:
            self._keeps = False
            with contextlib.suppress(OSError):  # it may be the same disk
                click.echo(f"gms: {path} cannot be written any more: {error.strerror}", err=True)

    @contextlib.contextmanager
    def _load(self) -> Iterator[Load | None]:
        wanted = self._wanted
        if not wanted.load:
            yield None
            return
        host, port = wanted.endpoint.host, wanted.endpoint.port
        with load(Task(host, port, self._name() or "", wanted.load, wanted.prompt_tokens, wanted.new_tokens, wanted.seed)) as flow:
            yield flow

    def _wait_until_ready(self, fleet: Fleet, lookout: Lookout, shadows: int) -> bool:
        """Wait for one primary and so many shadows; False if there were two primaries."""

        def settled() -> bool:
            roles = Counter(engine.standing for engine in lookout.engines())
            return lookout.max_primaries > 1 or (roles["primary"] == 1 and roles["standby"] >= shadows)

        try:
            lookout.wait(settled, f"one primary and {shadows} engines that stand by were not ready", self._wanted.patience_s, fleet.check)
        except AcquireTimeout as error:
            raise AcquireTimeout(error.message, hint=f"The logs end with: {fleet.last_lines()}") from error
        return lookout.max_primaries <= 1

    def _kill(self, number: int, fleet: Fleet, lookout: Lookout, flow: Load | None, right: list[Tokens]) -> Failover:
        primary = next(engine for engine in lookout.engines() if engine.standing == "primary")
        kind = self._wanted.kill if self._wanted.kill is not None else self._choice.choice(kinds(primary))
        if flow is not None:
            self._tell(f"kill {number} of {self._wanted.kills}: requests flow")
            flow.begin()
        time.sleep(self._choice.uniform(0.0, LONGEST_FLOW_S))
        killed = kill(primary, kind, self._choice)
        tries = self._answers_after_its_end(primary, fleet, lookout)
        asked = self._ask()
        requests = flow.end(killed) if flow is not None else Requests()
        events, promotion = self._afterwards(primary, killed, fleet, lookout)
        first = next((answer for answer in tries if answer.asked_at >= killed + events["noticed"]), tries[-1])
        failures = sum((answer.failures for answer in tries), Counter[str]())
        compared, wrong = differences([first.tokens, *asked], right)
        return Failover(
            number=number,
            kind=kind,
            engine=primary.name,
            successor=promotion[0] or next((engine.name for engine in lookout.engines() if engine.standing == "primary"), ""),
            term=promotion[1],
            epoch=promotion[2],
            events={**events, "first_token": first.at - killed},
            requests=msgspec.structs.replace(
                requests, broken=requests.broken + failures["broken"], rejected=failures["rejected"], refused=failures["refused"]
            ),
            compared_tokens=compared,
            wrong_tokens=wrong,
        )

    def _answers_after_its_end(self, primary: Engine, fleet: Fleet, lookout: Lookout) -> list[FirstAnswer]:
        """Ask until there is an answer to a request that was sent when the engine's end had been seen: what is left of it may answer until then."""
        found = [self._first_answer(fleet.check)]
        while found[-1].asked_at < lookout.seen_ending(primary.cohort):
            found.append(self._first_answer(fleet.check))
        return found

    def _afterwards(self, primary: Engine, killed: float, fleet: Fleet, lookout: Lookout) -> tuple[dict[str, float], tuple[str, int, int]]:
        """What the servers and the successor's log say, in seconds after the kill; and who the successor is, with its term and epoch."""
        lookout.wait(lambda: len(lookout.ends(primary.cohort)) == len(primary.devices), f"{primary.name} was not gone", AFTERWARDS_S, fleet.check)
        ends = lookout.ends(primary.cohort)
        events = {"noticed": min(end.noticed_s for end in ends) - killed, "gone": max(end.gone_s for end in ends) - killed}
        deadline = time.monotonic() + LOG_S
        while (promotion := fleet.promotion_since(killed)) is None:
            if time.monotonic() >= deadline:
                return events, ("", 0, 0)
            time.sleep(0.05)
        elected = promotion.elected_s - killed
        events |= {"elected": elected} | {name: elected + after / 1000 for name, after in promotion.after_ms.items()}
        return events, (promotion.engine, promotion.term, promotion.epoch)


def _default_devices() -> tuple[str, ...]:
    try:
        return () if list_gpus() else (HOST,)
    except DriverUnavailable:
        return (HOST,)
