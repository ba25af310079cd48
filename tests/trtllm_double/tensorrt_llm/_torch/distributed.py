"""How ranks add up their parts."""

import torch
from tensorrt_llm._utils import allreduce


class AllReduce(torch.nn.Module):
    """Upstream's has a table of addresses, which mean something in this process alone, and which is made with the module."""

    def __init__(self):
        super().__init__()
        with torch.device("cpu"):
            memory = torch.zeros(4)
            self.workspace = torch.tensor([memory.data_ptr(), id(self)])
        self.memory = memory

    def forward(self, tensor):
        assert self.workspace.tolist() == [self.memory.data_ptr(), id(self)]
        return allreduce(tensor)
