"""What processes that train one network together have to agree on."""

from __future__ import annotations

import torch
from torch import distributed, nn

from ..errors import CompactionError
from ..graph import ChannelGraph


class Ranks:
    """All calls are collective. With one process they do nothing.

    Args:
        model: as it is trained; of DistributedDataParallel its process group counts.
    """

    def __init__(self, model: nn.Module) -> None:
        wrapper = ddp_of(model)
        on = distributed.is_available() and distributed.is_initialized()
        self.group = None if wrapper is None else wrapper.process_group
        self.together = on and distributed.get_world_size(self.group) > 1
        self.device = next(model.parameters()).device
        if not on or distributed.get_backend(self.group) != "nccl":
            self.device = torch.device("cpu")
        elif self.device.type == "cpu":  # the whole copy of a sharded model
            self.device = torch.device("cuda", torch.cuda.current_device())

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Bit-equal everywhere."""
        if not self.together:
            return values
        values = values.to(self.device, copy=True)
        distributed.all_reduce(values, group=self.group)
        return self.of_first(values)

    def of_first(self, values: torch.Tensor) -> torch.Tensor:
        """What the first process has."""
        if not self.together:
            return values
        values = values.to(self.device, copy=True)
        distributed.broadcast(values, distributed.get_process_group_ranks(self.group)[0], group=self.group)
        return values

    def alike(self, values: torch.Tensor) -> bool:
        """Whether all have the same."""
        if not self.together:
            return True
        return self.all(torch.equal(self.of_first(values).cpu(), values.cpu()))

    def all(self, mine: bool) -> bool:
        """Whether it is true everywhere."""
        if not self.together:
            return mine
        flag = torch.tensor([int(mine)], device=self.device)
        distributed.all_reduce(flag, distributed.ReduceOp.MIN, group=self.group)
        return bool(flag)


def ddp_of(model: nn.Module) -> nn.parallel.DistributedDataParallel | None:
    """The wrapper, be it compiled or what is compiled; None where there is none."""
    while not isinstance(model, nn.parallel.DistributedDataParallel):
        model = getattr(model, "_orig_mod", None)
        if not isinstance(model, nn.Module):
            return None
    return model


def rebucket(model: nn.Module) -> None:
    """Gives DistributedDataParallel buckets for parameters of other shapes; wrapper, hooks and options stay.

    What it does when it is unpickled, less the change of process group.
    """
    wrapper = ddp_of(model)
    if wrapper is None:
        return
    wrapper.reducer = None  # its hooks go first
    # With static_graph the first backward asks each reducer once for the reduction at its end.
    wrapper._static_graph_delay_allreduce_enqueued = False
    parameters, sparse = wrapper._build_params_for_reducer()
    names = wrapper._build_debug_param_to_name_mapping(parameters)
    wrapper._ddp_init_helper(parameters, sparse, names, wrapper.static_graph)
    if wrapper.static_graph:
        wrapper.reducer._set_static_graph()
        wrapper.logger._set_static_graph()
    for hook, state in wrapper._comm_hooks:
        for kept in ("error_dict", "p_memory_dict", "q_memory_dict"):  # PowerSGD's, of the old buckets
            if isinstance(getattr(state, kept, None), dict):
                getattr(state, kept).clear()
        distributed._register_comm_hook(wrapper.reducer, state, hook)


def check_alike(ranks: Ranks, graph: ChannelGraph) -> None:
    """
    Raises:
        CompactionError: the processes train networks of other shapes, so that they cannot be cut alike.
    """
    shapes = [size for slot in graph.slots for size in (slot.tensor.dim(), *slot.tensor.shape)]
    # The length first: tensors of other lengths cannot be compared.
    if not ranks.alike(torch.tensor(len(shapes))) or not ranks.alike(torch.tensor(shapes)):
        raise CompactionError("EarlyPruner: the processes hold networks of other shapes; start all from one model")
