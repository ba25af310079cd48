"""Options of SGLang, resolved in this process as `sglang.launch_server` does it, and what GMS says to each: one start of Python for all of them.

    python sglang_refusals.py MODEL CASES

CASES is JSON: a list of ``[options, environment]``. Prints as JSON, for each, the code and the text of the error, or None.
The code is ``no such option`` if this version has none.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def answer(model: str, options: list[str], environment: dict[str, str]) -> Any:
    from sglang.srt.server_args import prepare_server_args

    os.environ.update(environment)
    try:
        arguments = prepare_server_args(["--model-path", model, "--device", "cpu", "--load-format", "gms", *options])
        if hasattr(arguments, "resolve_once"):
            arguments.resolve_once()
    except Exception as error:  # noqa: BLE001 - the test asks which
        return [getattr(error, "code", type(error).__name__), str(error)]
    except SystemExit:
        return ["no such option", ""]
    finally:
        for name in environment:
            del os.environ[name]
    return None


if __name__ == "__main__":
    from sglang.srt.plugins import load_plugins

    load_plugins()
    found = [answer(sys.argv[1], options, environment) for options, environment in json.loads(sys.argv[2])]
    sys.stdout.write("\n" + json.dumps(found) + "\n")
