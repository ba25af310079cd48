"""SGLang's options as they have been resolved. How that is asked differs from version to version."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Option = Callable[[str], Any]
"""What an option has come to; None if this version has no such option."""


def option_of(record: Any) -> Option:
    """Ask a ``ServerArgs`` that has been resolved."""
    try:
        from sglang.srt.arg_groups.overrides import resolution_result
    except ImportError:  # before 0.5.19 SGLang resolves in place
        return lambda name: getattr(record, name, None)
    return lambda name: resolution_result(record, name) if hasattr(record, name) else None


def argument(name: str) -> Any:
    """What an option has come to in this process; None if this version has no such option."""
    from sglang.srt.runtime_context import get_server_args

    return option_of(get_server_args())(name)
