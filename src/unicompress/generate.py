"""Writing with the language model, one cached step at a time: answers, and codes of pictures."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unicompress.backbones.base import Backbone, Choose, Stream
from unicompress.backbones.fixed_cache import FixedCache
from unicompress.engine import fixed_shapes, repeat
from unicompress.errors import InputError
from unicompress.sequence import (
    PADDING,
    SHARED,
    ImageLayout,
    PackedText,
    drawing,
    pad_left,
    reading,
    visible,
)


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
        start = now()
        yield
        setattr(self, part, getattr(self, part) + now() - start)


def measured(timings: Timings | None, part: str) -> contextlib.AbstractContextManager[None]:
    """Time a block where somebody asked for it."""
    return timings.measure(part) if timings else contextlib.nullcontext()


_clock: ContextVar[Callable[[], float]] = ContextVar("clock", default=time.perf_counter)


@contextlib.contextmanager
def processor_time() -> Iterator[None]:
    """Within the block times are seconds of this process's processor, not of the clock on the wall.

    Steadier where others use the same cores; it knows nothing of work on a GPU.
    """
    token = _clock.set(time.process_time)
    try:
        yield
    finally:
        _clock.reset(token)


def now() -> float:
    """Seconds; work that a GPU still has to do is waited for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return _clock.get()()


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
    unconditional: Sequence[list[int]],
    sampling: Sampling,
    uniforms: Float[Tensor, "b n c"],
    timings: Timings | None = None,
) -> Int[Tensor, "b n c"]:
    """Codes of one picture per prompt (token ids), globals first, in as many steps as codes.

    `unconditional` holds what guidance contrasts each prompt with.
    """
    rows = [*prompts, *(unconditional if sampling.guided else [])]
    delimiters = backbone.delimiters()
    device = delimiters.device
    text = pad_left(rows, device)
    start = text.ids.shape[1]
    keys = torch.cat([text.groups, text.groups.new_full((len(rows), layout.length), SHARED)], dim=1)
    columns = torch.arange(keys.shape[1], device=device)
    positions = (columns + (text.offsets - start)[:, None]).clamp(min=0)
    mask = visible(keys, keys, first=0)
    begin, separator, _, *line = (row.expand(len(rows), 1, -1) for row in delimiters)
    run = _Columns(backbone, layout, start, mask, positions)
    uniforms = uniforms.to(device)
    fed = torch.cat([backbone.embed_text(text.ids), begin], dim=1)
    chosen, part = [], "prefill"
    # With fixed shapes the steps from local code to local code are left for later, if all alike.
    later = run.fixed is not None and not layout.row_ends
    single = layout.global_count + 1 if later else layout.tokens
    for index in range(single):
        with measured(timings, part):
            hidden = run(fed)
        part = "lm_steps"
        stream: Stream = "global" if index < layout.global_count else "local"
        with measured(timings, "head"):
            choose = sampling.chooser(uniforms[:, index])
            codes = backbone.sample_codes(hidden[:, -1], stream, choose)
        chosen.append(codes[: len(prompts)])
        if index + 1 < layout.tokens:
            fed = backbone.embed_codes(codes[:, None], stream)
        if index + 1 == layout.global_count:
            fed = torch.cat([fed, separator], dim=1)
        if layout.ends_row(index):
            fed = torch.cat([fed, *line], dim=1)
    found = torch.stack(chosen, dim=1)
    if single == layout.tokens:
        return found
    with measured(timings, "lm_steps"):
        return torch.cat([found, run.rest(codes, sampling, uniforms[:, single:])], dim=1)


class _Columns:
    """Runs the language model over the columns of a drawing, a few at a time, with its cache."""

    def __init__(
        self,
        backbone: Backbone,
        layout: ImageLayout,
        start: int,  # column of the image's BOS
        mask: Bool[Tensor, "b 1 l l"],
        positions: Int[Tensor, "b l"],
    ):
        self.backbone = backbone
        self.mask, self.positions = mask, positions
        self.done = 0
        self.cache = backbone.new_cache(mask.shape[-1])
        self.fixed: FixedCache | None = None
        if fixed_shapes():
            if getattr(backbone, "accelerators", None):
                raise InputError("accelerators change shapes while drawing: use the engine eager")
            self.fixed = FixedCache(self.cache, mask.shape[-1], mask.device)
        self.image = drawing(layout, start, mask.shape[-1])

    def __call__(self, fed: Float[Tensor, "b n h"]) -> Float[Tensor, "b n h"]:
        """Hidden states of the next columns."""
        new = slice(self.done, self.done + fed.shape[1])
        self.done = new.stop
        rows, places = self.mask[:, :, new], self.positions[:, new]
        if self.fixed is None:
            image = replace(self.image, keys=self.image.keys[: new.stop])
            return self.backbone(fed, rows[..., : new.stop], places, self.cache, image)
        self.fixed.put(torch.arange(new.start, new.stop, device=fed.device))
        return self.backbone(fed, rows, places, self.fixed.cache, self.image)

    def rest(
        self,
        codes: Int[Tensor, "b c"],
        sampling: Sampling,
        uniforms: Float[Tensor, "p n c"],
    ) -> Int[Tensor, "p n c"]:
        """The local codes that follow `codes`, one for each column of `uniforms`.

        Everything that changes from step to step is a tensor changed in place, and choosing is
        part of the step: it can be compiled, or recorded and replayed without the host.
        """
        assert self.fixed is not None  # its only caller asks before
        backbone, cache = self.backbone, self.fixed.cache
        count = uniforms.shape[1]
        codes = codes.clone()
        place = torch.tensor([self.done], device=codes.device)
        index = torch.zeros_like(place)
        found = codes.new_empty(len(uniforms), count, codes.shape[1])
        self.fixed.put(place)

        def step() -> None:
            fed = backbone.embed_codes(codes[:, None], "local")
            rows, places = self.mask.index_select(2, place), self.positions.index_select(1, place)
            hidden = backbone(fed, rows, places, cache, self.image)
            choose = sampling.chooser(uniforms.index_select(1, index)[:, 0])
            codes.copy_(backbone.sample_codes(hidden[:, -1], "local", choose))
            found.index_copy_(1, index, codes[: len(found), None])
            place.add_(1)
            index.add_(1)

        repeat(step, count, codes.device)
        return found


@torch.no_grad()
def write_answers(
    backbone: Backbone,
    image: Float[Tensor, "b i h"],
    text: PackedText,
    *,
    count: int,
    end: int,
    columns: Bool[Tensor, " i"] | None = None,
) -> Int[Tensor, "b q n"]:
    """The most likely continuation of every block, up to `count` tokens.

    The image is read once for all its blocks, and all blocks advance in the same step; none sees
    another. What follows `end` means nothing. `columns` marks the image's tokens as in `read_text`.
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
        None if columns is None else reading(columns, keys.shape[1]),
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
            None if columns is None else reading(columns, keys.shape[1]),
        )
    return torch.stack(written, dim=-1)
