"""Visual withdrawal: late layers go on without the image (understanding)."""

from typing import ClassVar

from unicompress.accelerators.base import TEXT, Accelerator, Mode, Task, accelerators
from unicompress.errors import InputError


@accelerators.register("withdrawal")
class Withdrawal(Accelerator):
    """All image tokens leave after the first `after` layers; the text keeps its positions.

    What the attention analysis of the paper suggests and what related work does at inference
    (VTW); the paper's own accelerator is HiMix. `unicompress analyze attention` tells from which
    layer on the image gets little attention. Cost: `after` full layers, the rest at
    T^2 d + 8 T d^2.
    """

    task: ClassVar[Task] = "understanding"

    def __init__(self, *, after: int, projections: str = TEXT):
        super().__init__(projections=projections)
        if after < 0:
            raise InputError(f"withdrawal needs after of 0 or more layers, got {after}")
        self.after = after

    def plan(self, layers: int) -> tuple[Mode, ...]:
        """`full` for the first layers, `text` for the rest."""
        if self.after > layers:
            raise InputError(
                f"withdrawal(after={self.after}) needs at least {self.after} layers, "
                f"the language model has {layers}"
            )
        return tuple("full" if number < self.after else "text" for number in range(layers))
