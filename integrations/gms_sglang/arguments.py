"""SGLang's options as its processes have resolved them. How that is asked differs from version to version."""

from __future__ import annotations

from typing import Any


def argument(name: str, otherwise: Any = None) -> Any:
    """What an option has come to in this process; ``otherwise`` if this version has no such option."""
    record = _record()
    try:
        from sglang.srt.arg_groups.overrides import resolution_result
    except ImportError:  # 0.5.16 resolves in place
        return getattr(record, name, otherwise)
    return resolution_result(record, name) if hasattr(record, name) else otherwise


def _record() -> Any:
    try:
        from sglang.srt.runtime_context import get_server_args
    except ImportError:
        from sglang.srt.server_args import get_global_server_args as get_server_args
    return get_server_args()
