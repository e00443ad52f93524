"""Arithmetic and memory of one run of a task, counted operation by operation."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Meter:
    """What one run took."""

    flops: int  # of matrix products, convolutions and attention
    peak_bytes: int  # most memory held at once by tensors that the run created; not the weights


def meter(task: Callable[[], object], device: torch.device) -> Meter:
    """Run a task once and count; on a GPU memory is what its allocator reports."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with flop_counter() as flops, _Live() as live:
        task()
    peak = torch.cuda.max_memory_allocated(device) - before if cuda else live.peak
    return Meter(int(flops.get_total_flops()), peak)


def count_flops(task: Callable[[], object]) -> int:
    """Floating-point operations of matrix products, convolutions and attention in one run."""
    with flop_counter() as counter:
        task()
    return int(counter.get_total_flops())


def flop_counter() -> FlopCounterMode:
    """Counts inside a `with` block, fused attention on a CPU included; one use each."""
    return FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)


class _Live(TorchDispatchMode):
    """Adds up the memory of all tensors made inside the block that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_iter((args, kwargs)):
            if isinstance(value, Tensor):
                self._watch(value, 0)  # made elsewhere: a weight, or an input
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._watch(value, value.untyped_storage().nbytes())
        return result

    def _watch(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Two matrix products of shapes [b, heads, queries, keys]."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (width + value[3])


def _attention_backward_flops(
    gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any
) -> int:
    """The scores once more, and the gradients of values, scores, queries and keys."""
    return 5 * _attention_flops(query, key, value) // 2


# torch counts fused attention on GPUs only.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
