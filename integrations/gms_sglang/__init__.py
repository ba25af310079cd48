"""GMS for SGLang: `--load-format gms`.

SGLang calls `register` in the process of the command line and in each scheduler, before it looks at any option. What a plugin raises there is
logged and swallowed, so the load format becomes known as the last step: without everything before it, SGLang refuses it.
"""

from __future__ import annotations

from gms_core.engine_log import log_as

LOG = "sglang.gms"
"""Below SGLang's own logger, whose handlers and level it shares."""


def register() -> None:
    """Entry point of the group ``sglang.srt.plugins``. Without ``--load-format gms`` it changes nothing that can be seen."""
    from gms_sglang.hooks import register_hooks
    from gms_sglang.load_format import HOOKS, add_load_format

    log_as(LOG)
    register_hooks(HOOKS)
    add_load_format()
