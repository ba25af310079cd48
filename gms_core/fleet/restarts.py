"""Which engine to start, and when, as pure functions of what has been seen: nothing here starts or ends anything.

Every engine starts as a shadow; the lock makes one of them the primary. So to keep a fleet alive means to start the missing ones: one at a time, or
a few if that is wanted, so that they do not take processor time and memory from one another, and none during a promotion; later and later where they
end before they are ready; and not at all any more once that has happened too often with nobody left to serve.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from gms_core.protocol.messages import Role

WRONG_COMMAND_LINE = 2
"""The exit code of programs that do not understand their command line, argparse's and click's among them."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What may differ between fleets.

    Attributes:
        autonomous: Whether a standby takes over by itself; if not, a standby is as ready as it gets.
        first_delay_s: Seconds between the end of an engine and its next start.
        longest_delay_s: Seconds that this can become, doubled with each life in a row that failed.
        most_failures: Lives that may fail in a row, over all engines, with no primary in between.
        settle_s: Seconds after which a standby without a primary counts as ready: its lock is with somebody who cannot be seen from here.
        start_timeout_s: Seconds from its start until an engine stands by; one that has not is ended, as it keeps others from being started.
        parallel_starts: Engines that may be starting at once beside one that is ready.
        follows: Whether another node decides which engine starts next. This one's parts of all engines are started, and wait for that.
    """

    autonomous: bool = True
    first_delay_s: float = 1.0
    longest_delay_s: float = 30.0
    most_failures: int = 5
    settle_s: float = 5.0
    start_timeout_s: float = 1800.0
    parallel_starts: int = 1
    follows: bool = False

    def delay_s(self, failures: int) -> float:
        """Seconds before the next start of an engine whose last lives, so many of them, have failed."""
        return min(self.longest_delay_s, self.first_delay_s * 2.0 ** max(0, min(failures, 64) - 1))


@dataclass(frozen=True, slots=True)
class Seen:
    """What the servers say of a running engine.

    Attributes:
        role: As it last said itself.
        role_age_s: Seconds for which it has had that role.
        fencing: Whether it is being ended.
    """

    role: Role
    role_age_s: float
    fencing: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """One of the wanted engines, whether it runs or not.

    Attributes:
        number: Its number; it keeps it over all its lives.
        running: Whether any process of it is there.
        seen: What the servers last said of this life; None before it has joined one.
        served: Whether it has been the primary in this life.
        lives: How often it was started.
        failures: Lives in a row, up to the last one that ended, that failed.
        due: When it may be started, on the monotonic clock.
    """

    number: int
    running: bool = False
    seen: Seen | None = None
    served: bool = False
    lives: int = 0
    failures: int = 0
    due: float = -math.inf

    @property
    def primary(self) -> bool:
        """Whether it serves."""
        return self.running and self.seen is not None and self.seen.role == "primary" and not self.seen.fencing

    @property
    def standby(self) -> bool:
        """Whether it could take over."""
        return self.running and self.seen is not None and self.seen.role == "standby" and not self.seen.fencing

    @property
    def starting(self) -> bool:
        """Whether it is not ready yet."""
        return self.running and not self.served and (self.seen is None or self.seen.role == "init")


@dataclass(frozen=True, slots=True)
class Fleet:
    """All wanted engines.

    Attributes:
        places: By number, ascending.
        primary_elsewhere: Whether an engine that is not of this fleet has the same lock, and serves.
        proven: Whether an engine of it has ever served or stood by: its command is right then.
        refused: Whether the last life ended as that of a program whose command line is wrong.
        barren: Lives in a row that failed since there was last a primary, or a standby where none takes over by itself or the primary is elsewhere.
    """

    places: tuple[Place, ...]
    primary_elsewhere: bool = False
    proven: bool = False
    refused: bool = False
    barren: int = 0

    @property
    def has_primary(self) -> bool:
        """Whether anybody serves."""
        return self.primary_elsewhere or any(place.primary for place in self.places)

    def place(self, number: int) -> Place:
        """The engine of this number."""
        return next(place for place in self.places if place.number == number)


@dataclass(frozen=True, slots=True)
class Start:
    """Start this engine now."""

    number: int


@dataclass(frozen=True, slots=True)
class Rest:
    """Nothing is to be done.

    Attributes:
        until: When to ask again at the latest if nothing happens before, on the monotonic clock; infinite for never.
    """

    until: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """It has no end.

    Attributes:
        failures: Lives in a row that failed.
        refused: Whether the command line is wrong; more tries would not help.
    """

    failures: int
    refused: bool = False


Step = Start | Rest | GiveUp


def new_fleet(numbers: tuple[int, ...]) -> Fleet:
    """A fleet of which nothing has been started."""
    return Fleet(tuple(Place(number) for number in sorted(numbers)))


def started(fleet: Fleet, number: int) -> Fleet:
    """The fleet once this engine has been started."""
    place = fleet.place(number)
    return _with(fleet, replace(place, running=True, seen=None, served=False, lives=place.lives + 1))


def observed(fleet: Fleet, seen: Mapping[int, Seen], policy: Policy, *, primary_elsewhere: bool, lost: Collection[int] = ()) -> Fleet:
    """The fleet once the servers have been asked.

    Args:
        fleet: What was known.
        seen: What they say of each engine. Of one that is not there, what was known of it stays.
        policy: What may differ between fleets.
        primary_elsewhere: Whether an engine that is not of this fleet has the same lock, and serves.
        lost: Engines whose servers answer and have not known them for a while. Nothing can become of those, unless they serve: a primary needs
            no server.
    """
    places = []
    for place in fleet.places:
        found = seen.get(place.number) if place.running else None
        if found is not None:
            places.append(replace(place, seen=found, served=place.served or (found.role == "primary" and not found.fencing)))
        else:
            places.append(replace(place, seen=None) if place.number in lost and not place.served else place)
    standby, own_primary = any(place.standby for place in places), any(place.primary for place in places)
    after = replace(fleet, places=tuple(places), primary_elsewhere=primary_elsewhere, proven=fleet.proven or standby or own_primary)
    fruitful = own_primary or (standby and (primary_elsewhere or not policy.autonomous))
    return replace(after, barren=0) if fruitful else after


def ended(fleet: Fleet, number: int, now: float, policy: Policy, code: int | None = None) -> Fleet:
    """The fleet once every process of this engine is gone; ``code`` is the first one's exit code, None if there was none."""
    place = fleet.place(number)
    good = place.served or (place.seen is not None and place.seen.role == "standby")
    failures = 0 if good else place.failures + 1
    after = _with(fleet, replace(place, running=False, failures=failures, due=now + policy.delay_s(failures)))
    after = replace(after, refused=code == WRONG_COMMAND_LINE and place.seen is None and not fleet.proven)
    return after if good else replace(after, barren=fleet.barren + 1)


def next_step(fleet: Fleet, now: float, policy: Policy, *, server_up: bool) -> Step:
    """What to do now.

    Args:
        fleet: What is known.
        now: On the monotonic clock.
        policy: What may differ between fleets.
        server_up: Whether the servers that the engines need answer; without them an engine cannot start.
    """
    running = [place for place in fleet.places if place.running]
    ready = [place for place in running if _is_ready(place, fleet, policy)]
    hopeless = not ready and not _serves(fleet) and (fleet.refused or fleet.barren >= policy.most_failures)
    if hopeless and not running:
        return GiveUp(fleet.barren, fleet.refused)
    alone = not ready and not fleet.primary_elsewhere
    starting = sum(place.starting for place in running)
    changing = starting + len(ready) < len(running)  # one takes over, or is being ended
    waits = not policy.follows and (changing or starting >= (1 if alone else policy.parallel_starts))
    if hopeless or waits or not server_up:
        return Rest(math.inf)
    candidates = [place for place in fleet.places if not place.running]
    if alone and not policy.follows:
        # Whatever keeps the first from becoming ready keeps the others from it too: they are not tried before one has been.
        candidates = [place for place in candidates if place.lives] or candidates[:1]
    due = sorted((place.due, place.number) for place in candidates)
    if not due:
        return Rest(math.inf)
    earliest, number = due[0]
    return Start(number) if earliest <= now else Rest(earliest)


def _serves(fleet: Fleet) -> bool:
    """Whether there is something to keep alive. A primary elsewhere says nothing of a command that has never worked."""
    return any(place.primary for place in fleet.places) or (fleet.primary_elsewhere and fleet.proven)


def _is_ready(place: Place, fleet: Fleet, policy: Policy) -> bool:
    """Whether a running engine needs nothing more, so that the next one may be started."""
    if place.seen is None or not place.standby:
        return place.primary
    return fleet.has_primary or not policy.autonomous or place.seen.role_age_s >= policy.settle_s


def _with(fleet: Fleet, changed: Place) -> Fleet:
    return replace(fleet, places=tuple(changed if place.number == changed.number else place for place in fleet.places))
