"""Transfer backends by their names: built in, by another name, and from plugins."""

import subprocess
import sys

import pytest

from gms_core.errors import BackendUnavailable, InvalidArgument
from gms_core.snapshot import registry

CARRIER = """
from gms_core.plugins.hookspecs import hookimpl
from gms_core.snapshot.transfer import Probe

class Pigeon:
    name = "{name}"
    directions = frozenset({{"restore"}})
    def probe(self): return Probe({usable}, "no pigeon is at home")
    def check(self, job): pass
    def open(self, job, memory): raise NotImplementedError

@hookimpl
def gms_transfer_backends(): return [Pigeon()]
"""


@pytest.fixture(autouse=True)
def no_allow_list(monkeypatch):
    monkeypatch.delenv("GMS_PLUGINS", raising=False)


def test_every_backend_has_the_name_that_it_is_found_by_when_it_is_built_in():
    assert registry.names()[0] == registry.DEFAULT == "staged"
    for name in ("staged", "aio", "uring", "local-ssd-pinned"):
        assert name in registry.names()
        assert registry.find(name).name == name


@pytest.mark.parametrize("alias", ["preadv", "cpu-staged", "local-ssd-striped"])
def test_backend_is_found_when_another_name_of_the_field_is_used(alias):
    assert registry.find(alias).name == "staged"
    assert alias not in registry.names()


def test_names_are_told_when_there_is_no_such_backend():
    with pytest.raises(InvalidArgument, match="no transfer backend 'fio'") as caught:
        registry.find("fio")
    assert all(name in caught.value.hint for name in ("staged", "aio", "uring", "local-ssd-striped", "local-ssd-pinned", "preadv"))


def test_default_is_usable_when_nothing_else_is():
    assert registry.usable("staged").probe().usable


def test_backend_of_a_plugin_is_found_when_it_is_installed(install_plugin):
    install_plugin("pigeon", CARRIER.format(name="pigeon", usable=True))
    assert registry.names()[-1] == "pigeon"
    assert registry.usable("pigeon").directions == {"restore"}
    with pytest.raises(InvalidArgument) as caught:
        registry.find("fio")
    assert "pigeon" in caught.value.hint


def test_reason_is_told_when_a_backend_cannot_be_used(install_plugin):
    install_plugin("pigeon", CARRIER.format(name="pigeon", usable=False))
    with pytest.raises(BackendUnavailable, match="'pigeon' cannot be used here: no pigeon is at home") as caught:
        registry.usable("pigeon")
    assert "'staged'" in caught.value.hint


@pytest.mark.parametrize("name", ["staged", "preadv"])
def test_built_in_backend_keeps_its_name_when_a_plugin_wants_it(install_plugin, name):
    install_plugin("pigeon", CARRIER.format(name=name, usable=False))
    assert registry.find(name).probe().usable
    assert registry.names().count(name) <= 1


def test_no_backend_is_imported_when_none_is_wanted():
    script = "import sys, gms_core.snapshot.registry; print([name for name in sys.modules if name.startswith('gms_core.snapshot.backends')])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "[]"
