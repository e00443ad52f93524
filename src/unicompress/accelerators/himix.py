"""HiMix: text reads the image, the image is never computed (understanding)."""

from typing import ClassVar

from unicompress.accelerators.base import Accelerator, Mode, Task, accelerators


@accelerators.register("himix")
class HiMix(Accelerator):
    """Image tokens are keys and values at every layer, and nothing else (section 5.1).

    Each layer projects the embeddings that entered the first layer, after its own input norm and
    with their own RoPE positions: both are left open by the paper. There are no queries, no output
    projection and no feed-forward network for them. Cost: T (T + M) d + 8 T d^2 a layer for T text
    and M image tokens, which is T / (T + M) of the full layer; the paper leaves out the image's
    keys and values, `cost.multiply_adds` counts them.
    """

    task: ClassVar[Task] = "understanding"

    def plan(self, layers: int) -> tuple[Mode, ...]:
        """`keys` everywhere."""
        mode: Mode = "keys"
        return (mode,) * layers
