"""How a file of options and a command line come together."""

import yaml
from tensorrt_llm.llmapi.llm_args import KvCacheConfig, MoeConfig, SpeculativeConfig

_FIELDS = {"kv_cache_config": KvCacheConfig, "moe_config": MoeConfig, "speculative_config": SpeculativeConfig}


def update_llm_args_with_extra_dict(llm_args, llm_args_dict, extra_llm_api_options=None):
    """The file counts. Blocks of these fields become objects; all others are left to the class of options."""
    made = {name: _FIELDS[name](**value) if name in _FIELDS else value for name, value in (llm_args_dict or {}).items()}
    return {**llm_args, **made}


def update_llm_args_with_extra_options(llm_args, extra_llm_api_options, explicit_cli_keys=None):
    if extra_llm_api_options is None:
        return llm_args
    with open(extra_llm_api_options) as file:
        return update_llm_args_with_extra_dict(llm_args, yaml.safe_load(file), extra_llm_api_options)
