"""The unit for systemd that is shipped: systemd understands it, and the service starts with it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.service_manager_stand_in import StandIn

GMS = [sys.executable, "-m", "gms_core.cli"]
UNIT = Path(__file__).parents[2] / "examples/deploy/systemd/gms.service"


def value(key: str, default: str = "") -> str:
    """What the unit says of a key."""
    found = re.findall(rf"^{key}=(.*)$", UNIT.read_text(), flags=re.MULTILINE)
    return found[-1] if found else default


@pytest.mark.parametrize("group", [None, os.getgid()])
def test_service_starts_in_the_directory_that_systemd_makes_for_the_unit(runtime_dir: Path, group: int | None) -> None:
    directory, mode = runtime_dir / value("RuntimeDirectory"), value("RuntimeDirectoryMode", "0755")
    if group is not None:  # what the unit says to change for others
        assert "RuntimeDirectoryMode=0710" in UNIT.read_text()
        mode = "0710"
    directory.mkdir()
    directory.chmod(int(mode, 8))  # as systemd does, whatever UMask= says
    words = value("ExecStart").replace(f"/run/{value('RuntimeDirectory')}", str(directory)).split()[1:]
    allow = [] if group is None else ["--allow", f":{group}"]
    with contextlib.closing(StandIn(str(runtime_dir / "notify"), int(value("FileDescriptorStoreMax")))) as systemd:
        systemd.start([*GMS, *words, "--device", "host", *allow])
        systemd.wait_until_told("READY=1")
        assert sorted(systemd.names) == ["host/label", "host/socket"]
        systemd.stop()


def test_unit_is_understood_by_systemd(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "gms.service"
    unit.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", UNIT.read_text(), flags=re.MULTILINE))
    said = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    lines = [line for line in (said.stdout + said.stderr).splitlines() if "gms.service" in line]
    assert [line for line in lines if "FileDescriptorStorePreserve" not in line] == [], "before version 254 there is no such key"
    assert said.returncode == 0, said.stderr


def test_unit_is_not_ended_when_the_kernel_ends_one_of_its_processes_for_lack_of_memory() -> None:
    assert "\nOOMPolicy=continue\n" in UNIT.read_text()


def test_unit_starts_what_is_documented() -> None:
    (command,) = re.findall(r"^ExecStart=\S+/gms (.*)$", UNIT.read_text(), flags=re.MULTILINE)
    assert subprocess.run([*GMS, *command.split(), "--help"], capture_output=True, check=False).returncode == 0
