"""HMGen: some middle layers compute the text alone (generation)."""

from typing import ClassVar

from unicompress.accelerators.base import TEXT, Accelerator, Mode, Task, accelerators
from unicompress.errors import InputError


@accelerators.register("hmgen")
class HMGen(Accelerator):
    """`count` shallow layers in the middle, each between full ones (section 5.2).

    In a shallow layer the text attends to the text, and the states of the image pass through:
    no attention, no feed-forward network, no keys and values. The paper does not say which layers
    are shallow; here they lie around layer L // 2, every `step`-th, the first and the last layer
    always full. `count=0` with projections of its own is the control that the paper lacks. Cost:
    `count` layers at T^2 d + 8 T d^2, the others full.
    """

    task: ClassVar[Task] = "generation"

    def __init__(self, *, count: int = 2, step: int = 2, projections: str = TEXT):
        super().__init__(projections=projections)
        if count < 0 or step < 1:
            raise InputError(
                f"hmgen needs count of 0 or more and step of 1 or more, got {count} and {step}"
            )
        self.count = count
        self.step = step

    def plan(self, layers: int) -> tuple[Mode, ...]:
        """`text` for the shallow layers, `full` for the rest."""
        first = layers // 2 - self.step * (self.count - 1) // 2
        shallow = range(first, first + self.step * self.count, self.step)
        if self.count and (shallow[0] < 1 or shallow[-1] > layers - 2):
            raise InputError(
                f"{self.count} shallow layers, every {self.step}, do not fit between the first and "
                f"the last of {layers} layers: lower count or step"
            )
        return tuple("text" if number in shallow else "full" for number in range(layers))
