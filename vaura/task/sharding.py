"""Parameters, gradients and optimizer states divided among processes: FSDP2, as `trainer.strategy=fsdp2`.

(Zhao et al. 2023, "PyTorch FSDP"; torch's `fully_shard`, per block.)
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn

from vaura.lm.llama import TokenLM


class FSDP2(ModelParallelStrategy):
    """Lightning's, where all processes divide the parameters, none a matrix product; a checkpoint is one whole file."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=False, **settings)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_processes * self.num_nodes
        super().setup_environment()


StrategyRegistry.register("fsdp2", FSDP2, description="Parameters divided among all processes by torch's fully_shard")


def shard(lm: TokenLM, conditioner: Any, mesh: Any) -> None:
    """Divide the parameters of both among the processes of `mesh`; each block is gathered when its turn comes."""
    try:
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    except ImportError:  # torch 2.5
        from torch.distributed._composable.fsdp import fully_shard, register_fsdp_forward_method
    for block in lm.blocks:
        fully_shard(block, mesh=mesh)
    for part in (lm, conditioner):
        if any(True for _ in part.parameters()):
            fully_shard(part, mesh=mesh)
    register_fsdp_forward_method(lm, "loss")


def gather(module: nn.Module) -> None:
    """Have whole parameters in every process, which all must ask for together; anything but training then runs as ever."""
    for part in module.modules():
        if callable(unshard := getattr(part, "unshard", None)):
            unshard()


def part_again(module: nn.Module) -> None:
    """Undo `gather`."""
    for part in module.modules():
        if callable(reshard := getattr(part, "reshard", None)):
            reshard()


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which the processes may hold parts; all must ask for it together."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()
