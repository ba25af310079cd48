"""``gms-trtllm-serve``: TensorRT-LLM's own server, told to share weights; as a command line, and as processes."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from trtllm_engines import TOKENS, answer_without_gms, by_the_adapter, everywhere

from gms_core.cli import gms as gms_command
from gms_core.cli.exit_codes import ExitCode
from gms_core.config import child_environment
from gms_core.errors import ConfigurationError
from gms_core.plugins.engines import find_installed, open_wheel
from gms_core.plugins.findings import Status
from tests.conftest import RunningServer
from tests.ports import free_port
from tests.trtllm_double import ROOT, STAGED_HOOKS, WITHOUT_GMS
from tests.unit.publishing import until

EXAMPLES = Path(__file__).parents[2] / "examples/trtllm"


@pytest.fixture
def handed(variant: str, monkeypatch: Any) -> Iterator[list[Any]]:
    """What `trtllm-serve` would be made an engine of."""
    from tensorrt_llm.commands import serve

    options: list[Any] = []
    monkeypatch.setattr(serve, "launch_server", lambda host, port, llm_args: options.append(llm_args))
    return options


def call(*words: str) -> Any:
    from gms_trtllm.serve import main

    return CliRunner().invoke(main, list(words))


def engine_options(llm_args: dict[str, Any]) -> Any:
    from tensorrt_llm.llmapi import llm

    llm_args.pop("backend")
    return llm.TorchLlmArgs(**llm_args)


@everywhere
def test_engine_shares_weights_when_the_command_line_says_so(variant: str, handed: list[Any]) -> None:
    from gms_trtllm.arguments import asks_for_gms

    result = call("model", "--tp_size", "2", "--load-format", "gms", "--gms-config", "tag=llama", "--gms-config", '{"mode": "ro"}', "--port", "9")
    assert (result.output, result.exit_code) == ("", 0)
    args = engine_options(*handed)
    assert asks_for_gms(args)
    assert (args.model, args.tensor_parallel_size, args.gms_config.tag, args.gms_config.mode) == ("model", 2, "llama", "ro")


@everywhere
def test_file_of_options_goes_along_when_the_command_line_adds_to_it(variant: str, handed: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("kv_cache_config:\n  max_tokens: 99\nmax_batch_size: 3\ngms_config:\n  tag: llama\n")
    for option in ([f"--config={file}"], ["--extra_llm_api_options", str(file)]):
        assert call("serve", "model", "--load_format", "GMS", *option, "--gms_config", "mode=rw").exit_code == 0
    for llm_args in handed:
        args = engine_options(llm_args)
        assert (args.kv_cache_config.max_tokens, args.max_batch_size, args.gms_config.tag, args.gms_config.mode) == (99, 3, "llama", "rw")


@everywhere
def test_words_are_handed_on_as_they_are_when_gms_is_not_asked_for(variant: str, handed: list[Any]) -> None:
    assert call("model", "--max_batch_size", "3").exit_code == 0
    assert "load_format" not in handed[0]
    assert call("model", "--load-format", "dummy").exit_code == 0
    assert handed[1]["load_format"] == "dummy"
    assert call("--nonsense").exit_code == 2


@by_the_adapter
@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--load-format", "gms", "--gms-config", "mode=write"], "gms_config: mode: Input should be 'auto', 'rw' or 'ro'"),
        (["--load-format", "gms", "--gms-config", "tag= "], "gms_config.tag must be a non-empty string"),
        (["--load-format", "gms", "--gms-config", "tags=llama"], "gms_config: tags: Extra inputs are not permitted"),
        (["--load-format", "gms", "--gms-config", "llama"], "'llama' is neither JSON nor KEY=VALUE"),
        (["--load-format", "gms", "--gms-config", "{llama"], "'{llama' is no JSON"),
        (["--load-format", "gms", "--gms-config", "tag=a", "--gms-config", '{"tag": "b"}'], "--gms-config: tag is given twice"),
        (["--gms-config", "tag=llama"], "--gms-config has no effect: the load format is not gms"),
        (["--load-format", "dummy", "--gms-config", "tag=llama"], "--gms-config has no effect: the load format is not gms"),
        (["--load-format", "dummy", "--config", "FILE"], "--load-format dummy, but load_format is gms in "),
        (["--config", "FILE", "--gms-config", "tag=other"], "--gms-config tag=other, but it is llama in "),
        (["--load-format", "gms", "--config", "FILE/absent"], "cannot be read as a file of options"),
        (["--load-format", "gms", "--config", "LIST"], "is not a block of options"),
    ],
)
def test_command_line_is_refused_when_it_is_wrong(variant: str, handed: list[Any], tmp_path: Path, words: list[str], problem: str) -> None:
    (tmp_path / "options.yaml").write_text("load_format: gms\ngms_config: {tag: llama}\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    places = {"FILE": str(tmp_path / "options.yaml"), "LIST": str(tmp_path / "list.yaml"), "FILE/absent": str(tmp_path / "absent.yaml")}
    result = call("model", *(places.get(word, word) for word in words))
    assert result.exit_code == ExitCode.USAGE
    assert problem in result.output
    assert handed == []


@by_the_adapter
def test_command_is_refused_when_it_takes_no_options_of_an_engine(variant: str) -> None:
    result = call("disaggregated", "--load-format", "gms", "-c", "file")
    assert result.exit_code == ExitCode.USAGE
    assert "trtllm-serve disaggregated takes no options of an engine" in result.output
    assert call("disaggregated", "-c", "file").exit_code == 0


@by_the_adapter
def test_command_is_refused_when_upstream_serves_otherwise(variant: str, monkeypatch: Any) -> None:
    from tensorrt_llm.commands import serve
    from tensorrt_llm.llmapi import llm

    with monkeypatch.context() as changed:
        changed.setattr(serve, "main", dict)
        result = call("model", "--load-format", "gms")
    assert result.exit_code == ExitCode.UNSUPPORTED
    assert "expected tensorrt_llm.commands.serve:main to be a command of click, found a type" in result.output
    with monkeypatch.context() as changed:
        changed.setattr(llm, "TorchLlmArgs", dict)
        result = call("model", "--load-format", "gms")
    assert result.exit_code == ExitCode.UNSUPPORTED
    assert "not TensorRT-LLM's own class of options" in result.output


def test_command_is_refused_when_there_is_no_engine() -> None:
    for words in (["-c", "from gms_trtllm.serve import main; main()"], ["-m", "gms_trtllm", "serve"]):
        command = [sys.executable, *words, "model", "--load-format", "gms"]
        environment = child_environment(PYTHONPATH=":".join(place for place in sys.path if place and place != str(ROOT)))
        result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert result.returncode == ExitCode.UNSUPPORTED
        assert result.stderr.startswith("gms: TensorRT-LLM is not installed in this environment")


@everywhere
@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_example_is_one_when_upstream_reads_it(variant: str, path: Path) -> None:
    from tensorrt_llm.llmapi import llm
    from tensorrt_llm.llmapi.llm_utils import update_llm_args_with_extra_options

    import gms_trtllm
    from gms_trtllm.arguments import asks_for_gms

    gms_trtllm.install()
    assert path.name in (EXAMPLES / "README.md").read_text()
    args = llm.TorchLlmArgs(**update_llm_args_with_extra_options({"model": "model"}, str(path)))
    assert asks_for_gms(args)
    assert args.gms_config.model_dump(exclude_unset=True) == yaml.safe_load(path.read_text())["gms_config"]


@pytest.mark.parametrize(
    "command",
    [
        ["gms-trtllm-serve", "MODEL", "--port", "80{n}"],
        ["/venv/bin/gms-trtllm-serve", "serve", "MODEL"],
        ["numactl", "-N", "0", "python", "-m", "gms_trtllm", "serve", "MODEL"],
    ],
)
def test_load_format_is_added_when_gms_run_starts_the_server(command: list[str], tmp_path: Path) -> None:
    from gms_trtllm.command_line import with_gms

    assert with_gms(command) == [*command, "--load-format", "gms"]
    for words in (["--load-format", "gms"], ["--load_format=GMS"]):
        assert with_gms([*command, *words]) == [*command, *words]
    file = tmp_path / "options.yaml"
    file.write_text("load_format: GMS\n")
    assert with_gms([*command, "--extra_llm_api_options", str(file)]) == [*command, "--extra_llm_api_options", str(file)]
    file.write_text("load_format: DUMMY\n")
    for words in (["--load-format", "dummy"], [f"--config={file}"]):
        with pytest.raises(ConfigurationError, match=r"(?i)--load-format dummy does not share weights"):
            with_gms([*command, *words])


def test_command_is_another_one_when_it_does_not_serve() -> None:
    from gms_trtllm.command_line import with_gms

    for command in ([], ["python", "-m", "gms_trtllm"], ["trtllm-bench", "MODEL"], ["vllm", "serve", "MODEL"]):
        assert with_gms(command) is None
    with pytest.raises(ConfigurationError, match="trtllm-serve loads no plugins"):
        with_gms(["/usr/bin/trtllm-serve", "MODEL"])


@contextlib.contextmanager
def serving(server: RunningServer, checkpoint: Path, tmp_path: Path, *words: str) -> Iterator[int]:
    """A server of two ranks, until the end of the context; its port."""
    port = free_port()
    command = [sys.executable, "-m", "gms_trtllm", "serve", str(checkpoint), "--host", "127.0.0.1", "--port", str(port), "--tp_size", "2", *words]
    environment = child_environment(
        PYTHONPATH=":".join([str(ROOT), *filter(None, sys.path)]), GMS_RUNTIME_DIR=str(server.directory), GMS_CACHE_DIR=str(tmp_path / "cache")
    )
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        until(lambda: process.poll() is not None or asked(port, "/health") is not None, patience_s=120)
        assert process.poll() is None, (tmp_path / "log").read_text()
        yield port
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, -signal.SIGTERM), (tmp_path / "log").read_text()  # later versions of uvicorn send themselves the signal again
    finally:
        process.kill()
        process.wait()


def asked(port: int, path: str, body: Any = None) -> Any:
    with contextlib.suppress(OSError), contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request("POST" if body else "GET", path, json.dumps(body) if body else None)
        return json.loads(connection.getresponse().read())
    return None


@pytest.mark.timeout(300)
@pytest.mark.parametrize("variant", [WITHOUT_GMS, STAGED_HOOKS], indirect=True)
def test_second_server_reads_nothing_when_the_first_has_published(variant: str, server: RunningServer, checkpoint: Path, tmp_path: Path) -> None:
    words = ["--load-format", "gms", "--gms-config", "tag=llama"]
    with serving(server, checkpoint, tmp_path, *words) as port:
        expected = asked(port, "/v1/completions", {"prompt": TOKENS})["choices"]
        assert asked(port, "/v1/models")["data"] == [{"id": str(checkpoint)}]
    torch_close(expected, answer_without_gms(checkpoint))
    with server.connect() as session:
        assert sorted(pool.name for pool in session.status().pools) == ["llama", "llama.1"]
    (checkpoint / "model.safetensors").unlink()
    with serving(server, checkpoint, tmp_path, *words, "--gms-config", "mode=ro") as port:
        torch_close(asked(port, "/v1/completions", {"prompt": TOKENS})["choices"], expected)


def torch_close(found: Any, expected: Any) -> None:
    import torch

    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-2)  # two ranks add up otherwise than one


def wheel(folder: Path, *, native: bool, **changes: str) -> Path:
    """The double as a wheel; changes: of text."""
    path = folder / "tensorrt_llm-1.2.1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for module in sorted(ROOT.glob("tensorrt_llm/**/*.py")):
            text = module.read_text().replace("    if HAS_GMS:\n        GMS = 3\n", "    GMS = 3\n" if native else "")
            text = text.replace("\nelse:\n\n    class TorchLlmArgs(BaseLlmArgs):\n        pass\n", "\n") if native else text
            for before, after in changes.items():
                text = text.replace(f"def {before}(", f"def {after}(")
            archive.writestr(str(module.relative_to(ROOT)), text)
        archive.writestr("tensorrt_llm-1.2.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: tensorrt-llm\nVersion: 1.2.1\n")
    return path


@pytest.mark.parametrize("native", [False, True])
def test_symbols_and_patches_are_found_when_a_wheel_is_checked(native: bool, tmp_path: Path) -> None:
    from gms_trtllm.plugin import gms_engines

    (adapter,) = gms_engines()
    with open_wheel(adapter, wheel(tmp_path, native=native)) as source:
        verdicts = {verdict.target: verdict for verdict in adapter.check(source)}
    assert [verdict for verdict in verdicts.values() if verdict.status is not Status.OK] == []
    assert ("not needed" in verdicts["trtllm-load-model"].evidence) == native
    assert ("not needed" in verdicts["tensorrt_llm._torch.memory.gpu_memory_backend:GMSBackend"].evidence) != native
    assert verdicts["trtllm 1.2.1"].evidence == "versions are told apart by what they offer"


def test_check_fails_by_name_when_a_symbol_is_gone(tmp_path: Path) -> None:
    from gms_trtllm.plugin import gms_engines

    (adapter,) = gms_engines()
    with open_wheel(adapter, wheel(tmp_path, native=False, load="load_model", from_config="of_config", reload="load_again")) as source:
        failed = {verdict.target: verdict.evidence for verdict in adapter.check(source) if verdict.status is not Status.OK}
    assert failed == {
        "trtllm-load-model": "tensorrt_llm._torch.pyexecutor.model_loader:ModelLoader.load not found",
        "tensorrt_llm._torch.pyexecutor.model_loader:AutoModelForCausalLM.from_config": "not found, needed for building a model without memory",
    }


def test_installed_engine_is_checked_when_gms_asks_for_it(tmp_path: Path, monkeypatch: Any) -> None:
    from gms_trtllm.plugin import gms_engines

    with zipfile.ZipFile(wheel(tmp_path, native=False)) as archive:
        archive.extractall(tmp_path / "site")
    metadata = tmp_path / "site/under_test-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: under-test\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[gms]\ntrtllm_under_test = gms_trtllm.plugin\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("GMS_PLUGINS", "trtllm_under_test")
    (adapter,) = gms_engines()
    assert find_installed(adapter) is not None
    result = CliRunner().invoke(gms_command, ["patches", "check", "--engine", "trtllm", "-v"])
    assert result.exit_code == 0, result.output
    assert f"trtllm 1.2.1  {tmp_path}/site/tensorrt_llm" in result.output
    assert "trtllm-load-model" in result.output
    assert "0 warn, 0 fail" in result.output
    shutil.rmtree(tmp_path / "site/tensorrt_llm/_torch/pyexecutor")
    assert CliRunner().invoke(gms_command, ["patches", "check", "--engine", "trtllm"]).exit_code == ExitCode.FINDINGS
