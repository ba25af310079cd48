"""``python -m gms_trtllm serve``: the same as ``gms-trtllm-serve``."""

from __future__ import annotations

import click


@click.group()
def main() -> None:
    """GMS for TensorRT-LLM."""


if __name__ == "__main__":
    from gms_trtllm.serve import main as serve

    main.add_command(serve, "serve")
    main(prog_name="python -m gms_trtllm")
