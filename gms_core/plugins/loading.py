"""Finds plugins and calls their hooks. Built-ins are plugins too; a broken third-party plugin is reported and left out, the others work on."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pluggy

from gms_core.config import settings
from gms_core.errors import ConfigurationError, PluginError
from gms_core.plugins import hookspecs

log = logging.getLogger("gms_core.plugins")

Kind = TypeVar("Kind")

ENTRY_POINTS = "gms"
"""Group of the entry points that announce a plugin."""

BUILT_IN = ("gms_core.cli.commands", "gms_core.plugins.machine")


@dataclass(slots=True)
class Plugins:
    """Plugins that are loaded.

    Attributes:
        manager: pluggy's, with all that could be loaded.
        broken: Why each of the others could not.
    """

    manager: pluggy.PluginManager
    broken: list[PluginError] = field(default_factory=list)

    def names(self) -> list[str]:
        """Names of the plugins that are loaded."""
        return sorted(name for name, plugin in self.manager.list_name_plugin() if plugin is not None)

    def collect(self, hook: str, kind: type[Kind]) -> list[Kind]:
        """Call a hook that returns lists of ``kind``, and join the lists."""
        collected: list[Kind] = []
        for name, results in self._each(hook, {}, ()):
            items = [item for result in results if isinstance(result, list) for item in result]
            if all(isinstance(result, list) for result in results) and all(isinstance(item, kind) for item in items):
                collected += items
            else:
                self.broken.append(_broken(name, f"its hook {hook} did not return a list of {kind.__name__}"))
        return collected

    def notify(self, hook: str, *, skip: Collection[object] = (), **arguments: object) -> None:
        """Call a hook that returns nothing, of every plugin that is not in ``skip``."""
        for _ in self._each(hook, arguments, skip):
            pass

    def _each(self, hook: str, arguments: dict[str, object], skip: Collection[object]) -> Iterator[tuple[str, list[object]]]:
        """Call a hook of each plugin by itself, so that one that fails joins `broken` and the others are heard."""
        plugins = self.manager.get_plugins()
        for implementation in getattr(self.manager.hook, hook).get_hookimpls():
            if implementation.plugin in skip:
                continue
            caller = self.manager.subset_hook_caller(hook, [other for other in plugins if other is not implementation.plugin])
            try:
                results = caller(**arguments)
            except Exception as error:  # noqa: BLE001 - foreign code can raise anything; it is reported under the plugin's name
                self.broken.append(_broken(implementation.plugin_name, f"its hook {hook} failed", error))
                continue
            yield implementation.plugin_name, results


def is_traced() -> bool:
    """Whether hook calls are to be logged. Not where the environment is wrong: whoever needs more of it says so."""
    try:
        return settings().trace_plugins
    except ConfigurationError:
        return False


def without_plugins() -> Plugins:
    """No plugin yet, but the hooks."""
    manager = pluggy.PluginManager("gms")
    manager.add_hookspecs(hookspecs)
    if is_traced():
        manager.add_hookcall_monitoring(_before, _after)
    return Plugins(manager)


def load_built_in() -> Plugins:
    """Load the built-in plugins alone."""
    plugins = without_plugins()
    for name in BUILT_IN:
        plugins.manager.register(importlib.import_module(name), name)
    return plugins


def load() -> Plugins:
    """Load the built-in plugins, then those that are installed and that GMS_PLUGINS allows.

    Raises:
        ConfigurationError: A variable of the environment is wrong. A plugin that cannot be loaded raises nothing: see `Plugins.broken`.
    """
    plugins = load_built_in()
    load_installed(plugins)
    return plugins


def load_installed(plugins: Plugins) -> None:
    """Load what is installed into ``plugins``; what was loaded before stays."""
    allowed = settings().plugins
    points = {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}
    if allowed is not None:
        for name in sorted(set(allowed) - points.keys()):
            plugins.broken.append(PluginError(f"plugin {name!r} is named by GMS_PLUGINS and not installed", hint="Install it, or take its name out."))
        points = {name: point for name, point in points.items() if name in allowed}
    for name, point in sorted(points.items()):
        if plugins.manager.has_plugin(name):
            continue
        try:
            plugins.manager.register(point.load(), name)
        except Exception as error:  # noqa: BLE001 - foreign code can raise anything; it is reported under the plugin's name
            if plugins.manager.has_plugin(name):
                plugins.manager.unregister(name=name)
            plugins.broken.append(_broken(name, f"{point.value} cannot be loaded", error))


def _broken(name: str, what: str, error: Exception | None = None) -> PluginError:
    why = f": {type(error).__name__}: {error}" if error is not None else ""
    broken = PluginError(f"plugin {name!r}: {what}{why}", hint="Repair or remove it, or leave it out of GMS_PLUGINS.", details={"plugin": name})
    broken.__cause__ = error
    return broken


def _before(hook: str, _: object, arguments: object) -> None:
    log.info("hook %s called with %s", hook, arguments)


def _after(outcome: pluggy.Result[Any], hook: str, _: object, __: object) -> None:
    log.info("hook %s %s", hook, f"failed: {outcome.exception}" if outcome.exception else f"returned {outcome.get_result()}")
