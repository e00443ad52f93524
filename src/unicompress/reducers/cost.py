"""What a reducer saves, counted: tokens per layer, prefill operations, cached keys and values.

Operations follow FastV's formula, L (4 n d^2 + 2 n^2 d + 2 n d m), in which a multiply-add counts
once and the feed-forward part has two matrices; it is the one behind the published figures of FastV
and G2TR. It counts the language model alone. What runs before it (a vision encoder that the dense
model runs too, and the encoder of the latents that G2TR needs) is extra: see `FLUX_ENCODER`.
"""

from dataclasses import dataclass

from unicompress.errors import InputError
from unicompress.reducers.base import Reducer, count_kept

# Multiply-adds of the FLUX image encoder, by pixels per side, counted on meta tensors. G2TR needs
# it in understanding, where the dense model does without; its published 1.94x leaves it out.
FLUX_ENCODER = {512: 0.56e12, 1024: 2.44e12}


@dataclass(frozen=True)
class Decoder:
    """The sizes of a language model that decide its cost."""

    layers: int  # L
    hidden: int  # d
    intermediate: int  # m
    key_value_width: int  # heads of keys times their width

    def prefill(self, lengths: list[int]) -> int:
        """Operations of a prompt that is `lengths[i]` tokens long in layer i."""
        if len(lengths) != self.layers:
            raise InputError(f"{self.layers} layers need as many lengths, got {len(lengths)}")
        d, m = self.hidden, self.intermediate
        return sum(4 * n * d * d + 2 * n * n * d + 2 * n * d * m for n in lengths)

    def cache_bytes(self, lengths: list[int], item: int = 2) -> int:
        """Keys and values of a prompt; `item` bytes per number."""
        return sum(2 * n * self.key_value_width * item for n in lengths)


BAGEL = Decoder(layers=28, hidden=3584, intermediate=18944, key_value_width=4 * 128)


def image_tokens(reducer: Reducer, tokens: int, layers: int) -> list[int]:
    """How many of an image's tokens each layer computes at the prompt."""
    left, found = tokens, []
    steps = {step.layer: step for step in reducer.steps(layers)}
    for layer in range(layers):
        if layer in steps:
            keep = steps[layer].keep
            left = min(left, count_kept(keep, tokens) if keep else 0)
        found.append(left)
    return found


def cached_tokens(reducer: Reducer, tokens: int, layers: int) -> list[int]:
    """How many of an image's tokens each layer has in its cache after the prompt."""
    computed = image_tokens(reducer, tokens, layers)
    retroactive = any(step.reducer.retroactive for step in reducer.steps(layers))
    return [computed[-1]] * layers if retroactive else computed


def average_kept(reducer: Reducer, tokens: int, layers: int) -> float:
    """Share of the image's tokens that is computed, averaged over layers."""
    return sum(image_tokens(reducer, tokens, layers)) / (tokens * layers)


@dataclass(frozen=True)
class Saving:
    """Dense against reduced, for one image in a prompt with `text` other tokens."""

    dense_prefill: int
    reduced_prefill: int
    dense_cache: int
    reduced_cache: int
    extra: int  # operations that only the reduced model needs, before its language model

    @property
    def prefill_ratio(self) -> float:
        """How many times cheaper the language model's prompt is; what papers report."""
        return self.dense_prefill / self.reduced_prefill

    @property
    def honest_ratio(self) -> float:
        """The same with what the reducer needs beside the language model."""
        return self.dense_prefill / (self.reduced_prefill + self.extra)


def saving(
    reducer: Reducer, decoder: Decoder, *, tokens: int, text: int, extra: float = 0
) -> Saving:
    """Count one reducer; `extra` operations are what it needs beside the language model."""
    dense = [tokens + text] * decoder.layers
    computed = [n + text for n in image_tokens(reducer, tokens, decoder.layers)]
    cached = [n + text for n in cached_tokens(reducer, tokens, decoder.layers)]
    return Saving(
        dense_prefill=decoder.prefill(dense),
        reduced_prefill=decoder.prefill(computed),
        dense_cache=decoder.cache_bytes(dense),
        reduced_cache=decoder.cache_bytes(cached),
        extra=round(extra),
    )
