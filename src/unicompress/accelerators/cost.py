"""What a plan costs: by the paper's formulas, and counted exactly."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig

from unicompress.accelerators.base import Mode


def paper_cost(plan: Sequence[Mode], *, text: int, image: int, width: int) -> int:
    """Cost of all layers by the formulas of the paper, for T text and M image tokens.

    full: (T + M)^2 d + 8 (T + M) d^2; keys: T (T + M) d + 8 T d^2; text: T^2 d + 8 T d^2. The keys
    and values of the image in a `keys` layer are left out, as in the paper.
    """
    rows = {"full": text + image, "keys": text, "text": text}
    keys = {"full": text + image, "keys": text + image, "text": text}
    return sum(rows[mode] * (keys[mode] * width + 8 * width**2) for mode in plan)


@dataclass(frozen=True)
class Widths:
    """The widths of a Llama-type layer."""

    hidden: int
    queries: int  # heads x head width
    keys: int  # key/value heads x head width
    feed_forward: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Widths":
        """Read from a language model's configuration."""
        heads = config.num_attention_heads
        head = getattr(config, "head_dim", None) or config.hidden_size // heads
        groups = getattr(config, "num_key_value_heads", None) or heads
        return cls(config.hidden_size, heads * head, groups * head, config.intermediate_size)


def multiply_adds(plan: Sequence[Mode], widths: Widths, *, text: int, image: int) -> int:
    """Multiplications with addition of all layers in one uncached pass.

    Counts matrix products: projections, scores and sums of values over all pairs (a causal mask
    saves nothing here), the three maps of the feed-forward network. Embeddings and head are not
    part of the layers.
    """
    total = 0
    for mode in plan:
        rows = text + image if mode == "full" else text
        keys = text if mode == "text" else text + image
        total += rows * (2 * widths.queries + 3 * widths.feed_forward) * widths.hidden
        total += keys * 2 * widths.keys * widths.hidden
        total += 2 * rows * keys * widths.queries
    return total
