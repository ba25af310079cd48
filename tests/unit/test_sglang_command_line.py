"""What `gms run` adds to command lines of SGLang, without an SGLang."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gms_core.errors import ConfigurationError
from gms_sglang.command_line import with_gms

ADDED = ["--load-format", "gms"]


@pytest.mark.parametrize(
    "command",
    [
        ["python", "-m", "sglang.launch_server", "--model-path", "MODEL", "--port", "80{n}"],
        ["sglang", "serve", "--model-path", "MODEL"],
        ["/venv/bin/sglang", "serve", "MODEL"],
        ["numactl", "-N", "0", "python", "-m", "sglang.cli.main", "serve", "MODEL"],
        ["sglang", "serve", "MODEL", "--load-balance-method", "auto"],
        ["sglang", "serve", "MODEL", "--config", "absent.yaml"],
    ],
)
def test_load_format_is_added_when_there_is_none(command: list[str]) -> None:
    assert with_gms(command) == [*command, *ADDED]


@pytest.mark.parametrize("words", [["--load-format", "gms"], ["--load-format=gms"], ["--load-f", "gms"]])
def test_nothing_is_added_when_the_load_format_is_there(words: list[str]) -> None:
    command = ["sglang", "serve", "MODEL", *words, "--port", "8000"]
    assert with_gms(command) == command


def test_another_load_format_is_refused_when_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "options.yaml").write_text("load-format: dummy\n")
    for words in (["--load-format", "dummy"], ["--load-format=dummy"], ["--config", str(tmp_path / "options.yaml")]):
        with pytest.raises(ConfigurationError, match="--load-format dummy does not share weights"):
            with_gms(["python", "-m", "sglang.launch_server", "--model-path", "MODEL", *words])


@pytest.mark.parametrize("command", [[], ["sglang"], ["sglang", "generate"], ["sh", "-c", "sglang serve MODEL"], ["vllm", "serve", "MODEL"]])
def test_command_is_not_ours_when_it_does_not_start_a_server_of_sglang(command: list[str]) -> None:
    assert with_gms(command) is None


def test_adapter_imports_no_engine_when_gms_asks_it() -> None:
    code = "import gms_sglang.plugin, sys; assert not {'sglang', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
