"""Which failover block an engine has: its own, or the one of the environment."""

from __future__ import annotations

import json

from gms_core.config import settings
from gms_core.engine_config import FailoverConfig, GmsConfig, validated
from gms_core.errors import ConfigurationError

VARIABLE = "GMS_FAILOVER"


def failover_config(gms: GmsConfig) -> FailoverConfig | None:
    """The block under ``failover`` of an engine's configuration; GMS_FAILOVER if it has no such key; None if there is neither.

    A key that is there and null says that the engine does not fail over, whatever the environment says.

    Raises:
        ConfigurationError: The variable is no JSON, names an unknown option, or has a wrong value.
    """
    if "failover" in gms.model_fields_set:
        return gms.failover
    text = settings().failover
    if not text.strip():
        return None
    try:
        block = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigurationError(f"{VARIABLE} is no JSON: {error}", hint="""Such as GMS_FAILOVER='{"lock": "gms:primary"}'.""") from error
    return validated(FailoverConfig, block, where=VARIABLE)
