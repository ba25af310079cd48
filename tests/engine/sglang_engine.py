"""An engine of SGLang in a program, started and asked by lines: its ``Engine`` has no HTTP server that could be held.

    python sglang_engine.py MODEL GMS OPTIONS

GMS is the block for GMS as JSON, or ``null`` for stock SGLang; OPTIONS are further arguments of ``sglang.Engine``, as JSON. Each line on the standard
input is a JSON list: what is asked, and its arguments, the last of which may be an object of keyword arguments. It is answered by one line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from typing import Any

PROMPTS = [[5, 17, 33, 101, 7], [11, 12, 13], [400, 3, 250, 77, 8, 9, 10, 44]]
OPTIONS = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "dtype": "float32",
    "context_length": 128,
    "mem_fraction_static": 0.2,
    "max_total_tokens": 4096,
    "skip_tokenizer_init": True,
    "sleep_on_idle": True,
    "log_level": "info",
}


class Asked:
    """What can be asked of the engine."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def tokens(self, count: int = 24) -> list[list[int]]:
        """What it says to some prompts, greedily."""
        sampling = {"temperature": 0.0, "max_new_tokens": count, "ignore_eos": True}
        return [answer["output_ids"] for answer in self._engine.generate(input_ids=PROMPTS, sampling_params=sampling)]

    def size(self) -> int:
        """Tokens of the KV cache."""
        return int(self._engine.get_server_info()["max_total_num_tokens"])

    def call(self, method: str, **arguments: Any) -> None:
        """A remote call as a program makes it."""
        self._engine.collective_rpc(f"gms_{method}", **arguments)

    def front_end_call(self, method: str, **arguments: Any) -> Any:
        """A remote call as a front end makes it, and the answers of all ranks."""
        from sglang.srt.managers.io_struct import RpcReqInput, sock_recv, sock_send

        from gms_sglang.rpc_answers import ABSTRACT, CALL, parameters

        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("")
            listener.listen()
            address = ABSTRACT + listener.getsockname()[1:].decode()
            sock_send(self._engine.send_to_rpc, RpcReqInput(method=CALL, parameters=parameters(method, arguments, 7, address)))
            connection, _ = listener.accept()
            with connection, connection.makefile() as file:
                told = json.load(file)
            assert sock_recv(self._engine.send_to_rpc).success
        assert told["call"] == 7
        return told["answers"]

    def release(self, *tags: str) -> None:
        self._engine.release_memory_occupation(list(tags) or None)

    def resume(self, *tags: str) -> None:
        self._engine.resume_memory_occupation(list(tags) or None)


def main(model: str, gms: str, options: str) -> None:
    import sglang

    from gms_core.failover.cohort import begin_cohort

    block = json.loads(gms)
    if block is not None and block.get("failover") is not None:
        begin_cohort("sglang")
    ours = {} if block is None else {"load_format": "gms", "model_loader_extra_config": json.dumps({"gms": block})}
    with contextlib.redirect_stdout(sys.stderr):
        asked = Asked(sglang.Engine(model_path=model, **{**OPTIONS, **ours, **json.loads(options)}))
    say({"ready": True})
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        keywords = arguments.pop() if arguments and isinstance(arguments[-1], dict) else {}
        try:
            say({"answer": getattr(asked, name)(*arguments, **keywords)})
        except Exception as error:  # noqa: BLE001 - the test asks which
            say({"error": getattr(error, "code", type(error).__name__), "message": str(error) or repr(error)})


def say(answer: dict[str, Any]) -> None:
    sys.__stdout__.write(json.dumps(answer) + "\n")
    sys.__stdout__.flush()


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    finally:
        os.kill(os.getpid(), signal.SIGKILL)
