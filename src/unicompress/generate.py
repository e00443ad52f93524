"""Writing with the language model, one cached step at a time: answers, and codes of pictures."""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unicompress.backbones.base import Backbone, Choose, Stream
from unicompress.errors import InputError
from unicompress.sequence import PADDING, SHARED, ImageLayout, PackedText, pad_left, visible


@dataclass
class Timings:
    """Seconds spent in each part of drawing, added up over calls; GPU work is waited for."""

    prefill: float = 0.0
    lm_steps: float = 0.0
    head: float = 0.0
    decompressor: float = 0.0
    image_decoder: float = 0.0

    @property
    def total(self) -> float:
        """All parts together."""
        return self.prefill + self.lm_steps + self.head + self.decompressor + self.image_decoder

    @contextlib.contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the time of the block to a part."""
        start = _now()
        yield
        setattr(self, part, getattr(self, part) + _now() - start)


def measured(timings: Timings | None, part: str) -> contextlib.AbstractContextManager[None]:
    """Time a block where somebody asked for it."""
    return timings.measure(part) if timings else contextlib.nullcontext()


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass(frozen=True)
class Sampling:
    """How codes are chosen: guidance first, then temperature, then the best k, then the top p.

    `cfg` = 1 asks for no guidance and no unconditional branch; `temperature` = 0 takes the best
    code; `top_k` = 0 keeps all.
    """

    cfg: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature must be 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.top_k < 0:
            raise InputError(f"top_k must be 0 (all) or more, got {self.top_k}")
        if not 0 <= self.cfg < math.inf:
            raise InputError(f"cfg must be 0 or more (1 is no guidance), got {self.cfg}")

    @property
    def guided(self) -> bool:
        """Whether an unconditional branch is needed."""
        return self.cfg != 1

    def choose(
        self, logits: Float[Tensor, "b v"], uniform: Float[Tensor, " k"]
    ) -> Int[Tensor, " b"]:
        """One code per row by inversion of the distribution function, at `uniform` in [0, 1).

        Guided logits hold the conditional rows, then the unconditional ones; both rows of a
        picture get its code.
        """
        logits = logits.double()  # so that no rounding can reach a code of probability zero
        if self.guided:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + self.cfg * (conditional - unconditional)
        if self.temperature == 0:
            codes = logits.argmax(dim=-1)
        else:
            order = self.probabilities(logits).cumsum(dim=-1)
            codes = torch.searchsorted(order, uniform[:, None] * order[:, -1:], right=True)[:, 0]
        return codes.repeat(2) if self.guided else codes

    def chooser(self, uniforms: Float[Tensor, "b c"]) -> Choose:
        """`choose` for the codes of one token, each with its own column of `uniforms`."""
        return lambda logits, number: self.choose(logits, uniforms[:, number])

    def probabilities(self, logits: Float[Tensor, "b v"]) -> Float[Tensor, "b v"]:
        """Probabilities after temperature, top-k and top-p (not guidance); zero where cut off."""
        scores = logits / self.temperature
        if 0 < self.top_k < scores.shape[-1]:
            least = scores.topk(self.top_k, dim=-1).values[:, -1:]
            scores = scores.masked_fill(scores < least, -math.inf)
        probabilities = scores.softmax(dim=-1)
        if self.top_p < 1:
            ranked, order = probabilities.sort(dim=-1, descending=True)
            # Kept: every code before which less than top_p has been gathered, so never none.
            cut = ranked.cumsum(dim=-1) - ranked >= self.top_p
            probabilities = probabilities.scatter(-1, order, ranked.masked_fill(cut, 0.0))
        return probabilities


def noise(seeds: Sequence[int], steps: int, codes: int) -> Float[Tensor, "b n c"]:
    """Uniform numbers, one row per seed: a picture depends on its own seed and on no neighbour.

    Drawn on the CPU, so that a seed means the same picture on every machine. Single precision
    values, in double precision: a product with a sum of probabilities stays below the sum.
    """
    rows = [
        torch.rand(steps, codes, generator=torch.Generator().manual_seed(seed)) for seed in seeds
    ]
    return torch.stack(rows).double()


@torch.no_grad()
def draw_codes(
    backbone: Backbone,
    layout: ImageLayout,
    prompts: Sequence[list[int]],
    *,
    unconditional: list[int],
    sampling: Sampling,
    uniforms: Float[Tensor, "b n c"],
    timings: Timings | None = None,
) -> Int[Tensor, "b n c"]:
    """Codes of one picture per prompt (token ids), globals first, in as many steps as codes."""
    rows = [*prompts, *([unconditional] * len(prompts) if sampling.guided else [])]
    delimiters = backbone.delimiters()
    device = delimiters.device
    text = pad_left(rows, device)
    start = text.ids.shape[1]
    keys = torch.cat([text.groups, text.groups.new_full((len(rows), layout.length), SHARED)], dim=1)
    columns = torch.arange(keys.shape[1], device=device)
    positions = (columns + (text.offsets - start)[:, None]).clamp(min=0)
    mask = visible(keys, keys, first=0)
    begin, separator, _ = (row.expand(len(rows), 1, -1) for row in delimiters)
    cache = backbone.new_cache(keys.shape[1])
    uniforms = uniforms.to(device)
    fed = torch.cat([backbone.embed_text(text.ids), begin], dim=1)
    done, chosen, part = 0, [], "prefill"
    for index in range(layout.tokens):
        with measured(timings, part):
            stop = done + fed.shape[1]
            hidden = backbone(fed, mask[:, :, done:stop, :stop], positions[:, done:stop], cache)
        done, part = stop, "lm_steps"
        stream: Stream = "global" if index < layout.global_count else "local"
        with measured(timings, "head"):
            choose = sampling.chooser(uniforms[:, index])
            codes = backbone.sample_codes(hidden[:, -1], stream, choose)
        chosen.append(codes[: len(prompts)])
        fed = backbone.embed_codes(codes[:, None], stream)
        if index + 1 == layout.global_count:
            fed = torch.cat([fed, separator], dim=1)
    return torch.stack(chosen, dim=1)


@torch.no_grad()
def write_answers(
    backbone: Backbone,
    image: Float[Tensor, "b i h"],
    text: PackedText,
    *,
    count: int,
    end: int,
) -> Int[Tensor, "b q n"]:
    """The most likely continuation of every block, up to `count` tokens.

    The image is read once for all its blocks, and all blocks advance in the same step; none sees
    another. What follows `end` means nothing.
    """
    b, blocks = text.last.shape
    shared = text.groups.new_full((b, image.shape[1]), SHARED)
    keys = torch.cat([shared, text.groups], dim=1)
    places = torch.arange(image.shape[1], device=image.device).expand(b, -1)
    hidden = backbone(
        torch.cat([image, backbone.embed_text(text.ids).to(image)], dim=1),
        visible(keys, keys, first=0),
        torch.cat([places, text.positions + image.shape[1]], dim=1),
        cache := backbone.new_cache(keys.shape[1] + blocks * count),
    )
    rows = torch.arange(b, device=image.device)[:, None]
    states = hidden[rows, text.last + image.shape[1]]  # [b, q, h]
    numbers = torch.arange(1, blocks + 1, device=image.device)
    numbers = torch.where(text.lengths > 0, numbers, PADDING)
    finished = text.lengths == 0
    written = []
    for step in range(count):
        ids = backbone.text_logits(states).argmax(dim=-1)
        written.append(ids)
        finished = finished | (ids == end)
        if step + 1 == count or bool(finished.all()):
            break
        keys = torch.cat([keys, numbers], dim=1)
        states = backbone(
            backbone.embed_text(ids),
            visible(numbers, keys, first=keys.shape[1] - blocks),
            text.lengths + image.shape[1] + step,
            cache,
        )
    return torch.stack(written, dim=-1)
