"""Training-time accelerators: which layers compute image tokens, and as what.

From "On the Limits of Token Reduction for Efficient Unified Vision Language Training"
(arXiv 2606.01503): HiMix for understanding, HMGen for generation. An accelerator is a plan, one
mode per layer; `decoder.py` walks through the layers as the plan says, with and without cache.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Bool
from torch import Tensor, nn

from unicompress.errors import InputError
from unicompress.registry import Family, Member

Task = Literal["understanding", "generation"]
# full: image tokens are computed like all others.
# keys: they are keys and values of the text only, projected from what entered the first layer.
# text: the layer does not know them; their states pass through as they are.
Mode = Literal["full", "keys", "text"]
TEXT = "text"  # name of the projections that are the language model's own


@dataclass(frozen=True)
class ImageColumns:
    """Where image tokens stand among all keys of a call, cached ones first, and what for.

    `keys` lies on the CPU, so that counting it waits for no device. Delimiters count as text.
    """

    task: Task
    keys: Bool[Tensor, " k"]


class Accelerator(Member, ABC):
    """A plan for one task.

    `projections` names the set of projections (W_Q, W_K, W_V of every layer that needs them) for
    image tokens: `text` is the language model's own, any other name a set of its own, which starts
    as a copy. Two accelerators with the same name share a set ("share all" in the paper), with
    different names they do not ("share partial").
    """

    task: ClassVar[Task]

    def __init__(self, *, projections: str = TEXT):
        if not projections.isidentifier() or hasattr(nn.ModuleDict, projections):
            raise InputError(
                f"projections must be a plain name such as image, got {projections!r}; "
                f"{TEXT!r} stands for the language model's own"
            )
        self.projections = projections

    @abstractmethod
    def plan(self, layers: int) -> tuple[Mode, ...]:
        """The mode of each of `layers` layers; raises InputError where they are too few."""


accelerators: Family[Accelerator] = Family("accelerator", home="unicompress.accelerators")


def build_accelerators(specs: Sequence[str]) -> dict[Task, Accelerator]:
    """One accelerator per task at most, from specs such as `hmgen(count=2)`."""
    found: dict[Task, Accelerator] = {}
    for spec in specs:
        member = accelerators.build(spec)
        if member.task in found:
            raise InputError(
                f"{found[member.task]} and {member} both accelerate {member.task}: choose one"
            )
        found[member.task] = member
    return found
