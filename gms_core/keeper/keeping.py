"""That there is a keeper which has everything, whatever happens to it: one that is lost is replaced by another that is given all of it again."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence

from gms_core.errors import GmsError, KeeperLost
from gms_core.keeper.connection import Keeper

log = logging.getLogger(__name__)


class Keeping:
    """A keeper, and another one in its place when it is lost. For one thread at a time.

    One that is lost may live on: the supervisor is not ended because it was slow, and has whatever it was given before the answer was given up.
    So one that is found again, and not started, is rid of all that is not to be kept.

    Args:
        keeper: The first one.
        again: Finds it again, or starts another one.

    Attributes:
        everything: Tells all that has to be kept, by name.
        label: Of a keeper that has all of it.
    """

    def __init__(self, keeper: Keeper, again: Callable[[], Keeper], label: str) -> None:
        self.everything: Callable[[], Mapping[str, int]] = dict
        self.label = label
        self._keeper = keeper
        self._again = again
        self._over = False

    def keep(self, descriptors: Mapping[str, int]) -> None:
        """Have descriptors kept.

        Raises:
            KeeperLost: There is no keeper, and none can be started; or systemd does not answer it.
            QuotaExceeded: It has no room for them.
        """
        try:
            self._keeper.keep(descriptors)
        except KeeperLost as error:
            if not self._keeper.lost:  # it lives, and has said that it cannot: nor could it if it were asked once more
                raise
            self._renew(error)
            self._keeper.keep(descriptors)

    def drop(self, names: Sequence[str]) -> None:
        """Have descriptors dropped.

        Raises:
            KeeperLost: The keeper is lost. The next check has one that does not keep them.
        """
        self._keeper.drop(names)

    def forget(self, names: Sequence[str]) -> None:
        """Have descriptors dropped of which nobody was told. A keeper that is lost is no error: the next one does not keep them."""
        with contextlib.suppress(KeeperLost):
            self._keeper.drop(names)

    def check(self) -> None:
        """See whether the keeper is there, and replace it if it is not."""
        try:
            if self._keeper.check() != self.label:
                raise KeeperLost("the keeper does not have everything")
        except KeeperLost as error:
            try:
                self._renew(error)
            except GmsError:
                if self._over:
                    return
                log.exception("there is no keeper that has everything: what none has will not outlive this server")

    def _renew(self, error: KeeperLost) -> None:
        if self._over:
            raise error
        log.warning("%s: it is looked for or started again, and given everything", error.message)
        self._keeper.abandon()
        self._keeper = self._again()
        try:
            everything = self.everything()
            self._keeper.keep(everything)
            if not self._keeper.new:
                self._keeper.drop([name for name in self._keeper.names() if name not in everything])
            self._keeper.set_label(self.label)
        except BaseException:
            self._keeper.close()  # it does not have everything yet: what is to be kept next finds it lost, and tries all of this again
            raise

    def end(self) -> None:
        """End the keeper, and with it the memory. Thread-safe: whatever is to be kept after this is refused."""
        self._over = True
        self._keeper.end()

    def close(self) -> None:
        """Leave the keeper with all that it has to the next server."""
        self._over = True
        self._keeper.close()
