"""For programs that train: it has the two functions by name."""

from tensorrt_llm._torch.virtual_memory import materialize_with_tag, release_with_tag


class WorkerExtension:
    def sleep(self, tags):
        return release_with_tag(*tags)

    def wakeup(self, tags):
        return materialize_with_tag(*tags)
