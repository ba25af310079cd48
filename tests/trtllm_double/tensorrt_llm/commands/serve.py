"""`trtllm-serve`: binds its port, makes the engine, and serves once that is ready."""

import asyncio
import socket

import click
import yaml
from tensorrt_llm import LLM
from tensorrt_llm.llmapi.llm_args import KvCacheConfig
from tensorrt_llm.llmapi.llm_utils import update_llm_args_with_extra_dict
from tensorrt_llm.logger import logger
from tensorrt_llm.serve.openai_server import OpenAIServer


def launch_server(host, port, llm_args):
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind((host, port))
        with LLM(**llm_args).wait_until_ready() as llm:
            server = OpenAIServer(llm=llm, model=llm_args["model"])
            asyncio.run(server(host, port, sockets=[s]))


@click.command("serve")
@click.argument("model", type=str)
@click.option("--tokenizer", type=str, default=None)
@click.option("--host", type=str, default="localhost")
@click.option("--port", type=int, default=8000)
@click.option("--backend", type=click.Choice(["pytorch"]), default="pytorch")
@click.option("--log_level", type=click.Choice(["error", "warning", "info", "debug"]), default="info")
@click.option("--max_batch_size", type=int, default=8)
@click.option("--tensor_parallel_size", "--tp_size", type=int, default=1)
@click.option("--free_gpu_memory_fraction", "--kv_cache_free_gpu_memory_fraction", type=float, default=0.9)
@click.option("--config", "--extra_llm_api_options", "extra_llm_api_options", type=str, default=None)
def serve(model, tokenizer, host, port, backend, log_level, max_batch_size, tensor_parallel_size, free_gpu_memory_fraction, extra_llm_api_options):
    logger.setLevel(log_level.upper())
    llm_args = {
        "model": model,
        "tokenizer": tokenizer,
        "tensor_parallel_size": tensor_parallel_size,
        "max_batch_size": max_batch_size,
        "kv_cache_config": KvCacheConfig(free_gpu_memory_fraction=free_gpu_memory_fraction),
        "backend": backend,
    }
    extra = {}
    if extra_llm_api_options is not None:
        with open(extra_llm_api_options) as file:
            extra = yaml.safe_load(file)
    launch_server(host, port, update_llm_args_with_extra_dict(llm_args, extra))


@click.command("disaggregated")
@click.option("-c", "--config_file", type=str, default=None)
def disaggregated(config_file):
    """Servers that share the work; each has its options in the file."""


class DefaultGroup(click.Group):
    """What is no command is a model that is to be served."""

    def resolve_command(self, ctx, args):
        if args and args[0] not in self.commands:
            return "serve", self.commands["serve"], args
        return super().resolve_command(ctx, args)


main = DefaultGroup(commands={"serve": serve, "disaggregated": disaggregated})
