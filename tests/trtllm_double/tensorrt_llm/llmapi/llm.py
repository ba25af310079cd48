"""The engine as a program sees it: a parent, and a process for each rank, which gets the options pickled."""

import multiprocessing
import os
import pickle
import tempfile
from pathlib import Path

from tensorrt_llm.llmapi.llm_args import TorchLlmArgs


class SamplingParams:
    def __init__(self, max_tokens=16, temperature=None):
        self.max_tokens = max_tokens


class Completion:
    def __init__(self, token_ids):
        self.token_ids = token_ids


class RequestOutput:
    def __init__(self, token_ids):
        self.outputs = [Completion(token_ids)]


class LLM:
    def __init__(self, model, **options):
        assert options.pop("backend", "pytorch") == "pytorch"
        for name in options:
            if name not in TorchLlmArgs.model_fields:
                raise ValueError(f"LLM got an argument {name!r} that it does not know")
        self.args = TorchLlmArgs(model=str(model), **options)
        self._folder = tempfile.TemporaryDirectory(prefix="trtllm-")
        context = multiprocessing.get_context("spawn")
        size = self.args.tensor_parallel_size
        pickled = pickle.dumps(self.args)
        self._ranks = []
        self._is_ready = False
        for rank in range(size):
            here, there = context.Pipe()
            os.environ["TRTLLM_DOUBLE_DEVICE"] = str(rank)
            process = context.Process(target=_worker_main, args=(pickled, rank, size, str(Path(self._folder.name, "group")), there))
            # As MPI's spawned processes, a rank gets no more of the environment than it needs to run.
            withheld = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("GMS_")}
            process.start()
            os.environ.update(withheld)
            there.close()
            self._ranks.append((process, here))
        del os.environ["TRTLLM_DOUBLE_DEVICE"]

    @property
    def pids(self):
        return [process.pid for process, _ in self._ranks]

    def wait_until_ready(self):
        answers = [self._answer(pipe) for _, pipe in self._ranks]
        failed = [answer[1] for answer in answers if answer[0] != "ready"]
        if failed:
            raise RuntimeError("; ".join(failed))
        self._is_ready = True
        return self

    def ask(self, method, *args):
        if not self._is_ready:  # upstream's constructor comes back when it is
            self.wait_until_ready()
        for _, pipe in self._ranks:
            pipe.send((method, args))
        return [self._answer(pipe) for _, pipe in self._ranks]

    def _collective_rpc(self, method, args):
        return self.ask(method, *args)

    def generate(self, inputs, sampling_params=None):
        """What the model computes of one prompt; of several, as upstream has them, the most likely token after each of theirs."""
        if sampling_params is None:
            return self.ask("forward", inputs)[0]
        rows = [self.ask("forward", prompt)[0] for prompt in inputs]
        return [RequestOutput([max(range(len(row)), key=row.__getitem__) for row in found]) for found in rows]

    def shutdown(self):
        for process, pipe in self._ranks:
            pipe.close()  # a rank ends when nobody asks it any more
            process.join(30)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
        self._ranks = []
        self._folder.cleanup()

    def kill(self):
        for process, _ in self._ranks:
            process.kill()
        self.shutdown()

    def _answer(self, pipe):
        if not pipe.poll(120):
            raise RuntimeError("a rank does not answer")
        try:
            return pipe.recv()
        except EOFError:
            return ("lost", "a rank has ended")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.shutdown()


def _worker_main(pickled, rank, size, group, pipe):
    import torch.distributed as dist
    from tensorrt_llm.rank import Rank

    args = pickle.loads(pickled)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{group}", rank=rank, world_size=size)
    try:
        engine = Rank(args, rank, size)
    except Exception as error:
        pipe.send(("failed", f"{type(error).__name__}: {error}"))
        return
    pipe.send(("ready", None))
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            break
        try:
            pipe.send(getattr(engine, method)(*arguments))
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {error}")
    engine.cleanup()
