"""What `gms run` adds to command lines of vLLM, without a vLLM."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gms_core.errors import ConfigurationError
from gms_core.plugins.engines import NodePlace
from gms_vllm.command_line import over_nodes, with_gms

ADDED = ["--load-format", "gms"]


@pytest.mark.parametrize(
    "command",
    [
        ["vllm", "serve", "MODEL"],
        ["/venv/bin/vllm", "serve", "MODEL", "--port", "80{n}"],
        ["numactl", "-N", "0", "vllm", "serve", "MODEL"],
        ["uv", "run", "vllm", "serve", "MODEL", "--model-loader-extra-config", '{"gms": {}}'],
        ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", "MODEL"],
        ["python", "-m", "vllm.entrypoints.cli.main", "serve", "MODEL"],
        ["vllm", "serve", "MODEL", "--config", "absent.yaml"],
        ["vllm", "serve", "MODEL", "--load"],
    ],
)
def test_load_format_is_added_when_there_is_none(command: list[str]) -> None:
    assert with_gms(command) == [*command, *ADDED]


@pytest.mark.parametrize("words", [["--load-format", "gms"], ["--load-format=gms"], ["--load_format", "GMS"], ["--load-f=gms"]])
def test_nothing_is_added_when_the_load_format_is_there(words: list[str]) -> None:
    command = ["vllm", "serve", "MODEL", *words, "--port", "8000"]
    assert with_gms(command) == command


@pytest.mark.parametrize("words", [["--load-format", "dummy"], ["--load-format=dummy"], ["--load_format", "dummy"], ["--loa", "dummy"]])
def test_another_load_format_is_refused_when_it_is_named(words: list[str]) -> None:
    with pytest.raises(ConfigurationError, match="--load-format dummy does not share weights") as caught:
        with_gms(["vllm", "serve", "MODEL", *words])
    assert "inner" in caught.value.hint


@pytest.mark.parametrize("text", ["load-format: dummy\n", "port: 80\nload_format : 'dummy' # quick\n"])
def test_another_load_format_is_refused_when_a_file_of_options_names_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "options.yaml").write_text(text)
    with pytest.raises(ConfigurationError, match="dummy"):
        with_gms(["vllm", "serve", "--config", str(tmp_path / "options.yaml")])
    (tmp_path / "options.yaml").write_text("load-format: gms\n")
    command = ["vllm", "serve", "--config", str(tmp_path / "options.yaml")]
    assert with_gms(command) == command
    assert with_gms([*command, "--load-format", "gms"]) == [*command, "--load-format", "gms"]


@pytest.mark.parametrize(
    "command",
    [[], ["vllm"], ["vllm", "bench", "serve"], ["sh", "-c", "vllm serve MODEL"], ["python", "-m", "sglang.launch_server"], ["echo", "serve"]],
)
def test_command_is_left_alone_when_it_does_not_start_vllm(command: list[str]) -> None:
    assert with_gms(command) is None


def test_no_vllm_is_imported_when_a_command_line_is_looked_at() -> None:
    code = "import sys; from gms_vllm.command_line import with_gms; with_gms(['vllm', 'serve', 'M']); print('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize(("node", "more"), [(0, []), (1, ["--headless"])])
def test_part_of_an_engine_is_started_when_there_are_several_nodes(node: int, more: list[str]) -> None:
    command = ["vllm", "serve", "MODEL", "--load-format", "gms"]
    words = ["--nnodes", "2", "--node-rank", str(node), "--master-addr", "10.0.0.1", "--master-port", "29501"]
    assert over_nodes(command, NodePlace(2, node, "10.0.0.1", 29501)) == [*command, *words, *more]


@pytest.mark.parametrize("word", ["--nnodes", "--nnodes=2", "--node_rank", "--node-r=1", "--master-addr", "--master-p", "--headless"])
def test_command_is_refused_when_it_says_something_of_nodes_itself(word: str) -> None:
    with pytest.raises(ConfigurationError, match=f"the command says {word} itself"):
        over_nodes(["vllm", "serve", "MODEL", "--load-format", "gms", word, "1"], NodePlace(2, 0, "10.0.0.1", 29500))
