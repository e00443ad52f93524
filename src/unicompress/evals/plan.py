"""What compression will save, foretold from a short calibration before anybody trains.

Drawing costs steps of the language model, one per token, and each step costs a little more the more
is in the cache. So: time one step at a short and at a long context, the head, the decompressor and
the image decoder; add up. A large language model is timed at two small depths and extrapolated,
layers being alike.
"""

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor

from unicompress.codec import CodecSpec
from unicompress.errors import InputError
from unicompress.evals.cost import Pair
from unicompress.evals.language_models import lm_config, random_codec, random_pair
from unicompress.generate import Sampling, noise, now
from unicompress.tokenizers.base import ImageTokenizer
from unicompress.unified import UnifiedModel

PROMPT = 24  # columns before the image: the start token and a caption
ENOUGH = 100 * 2**20  # bytes of weights that no cache holds, so that a step is bound as a real one
BUDGET = 20.0  # seconds of timing; building random weights comes on top
ROUNDS = 15  # at most


@dataclass(frozen=True)
class StepCost:
    """Seconds of one pass of the language model: `fixed` + `per_position` * what it can read."""

    fixed: float
    per_position: float

    def at(self, context: float) -> float:
        """Seconds with so many positions in the cache."""
        return self.fixed + self.per_position * context


@dataclass(frozen=True)
class Costs:
    """Medians in seconds for one batch."""

    step: StepCost
    prefill: float
    head: float  # one token's codes and their embedding
    decompressor: float  # one batch of pictures
    image_decoder: float

    def drawing(self, tokens: int, *, compressed: bool) -> float:
        """Seconds from prompts to pixels in `tokens` steps."""
        reads = PROMPT + 1 + (tokens - 1) / 2  # on average; the step's cost is linear in it
        steps = (tokens - 1) * self.step.at(reads) + tokens * self.head
        expand = self.decompressor if compressed else 0.0
        return self.prefill + steps + expand + self.image_decoder


@dataclass(frozen=True)
class Plan:
    """A prediction, and how far the decompressor may go before nothing is gained."""

    dense_tokens: int
    compressed_tokens: int
    dense_seconds: float
    compressed_seconds: float
    costs: Costs
    layers_timed: tuple[int, ...]
    layers: int

    @property
    def ratio(self) -> float:
        """Predicted generation time, compressed / dense."""
        return self.compressed_seconds / self.dense_seconds

    @property
    def limit(self) -> float:
        """The ratio if the decompressor were free."""
        return (self.compressed_seconds - self.costs.decompressor) / self.dense_seconds

    @property
    def break_even(self) -> float:
        """Seconds of the decompressor at which drawing takes as long as without compression."""
        return self.dense_seconds - (self.compressed_seconds - self.costs.decompressor)

    @property
    def step(self) -> float:
        """Seconds of one step halfway through the dense picture."""
        return self.costs.step.at(PROMPT + self.dense_tokens / 2)

    def in_steps(self, seconds: float) -> float:
        """Decompressor seconds as steps of the language model per dense token, the paper's c."""
        return seconds / self.step / self.dense_tokens


def make_plan(
    lm: str,
    *,
    tokenizer: ImageTokenizer,
    spec: CodecSpec,
    batch: int = 1,
    cfg: float = 2.0,
    dtype: torch.dtype = torch.float32,
    budget: float = BUDGET,
) -> Plan:
    """Calibrate with random weights and predict; raises InputError for an unknown shape."""
    config = lm_config(lm)
    if spec.identity:
        raise InputError("stride 1 without global tokens compresses nothing: there is no plan")
    layers = config.num_hidden_layers
    codec = random_codec(tokenizer, spec)
    pairs = []
    for depth in timed_depths(config, dtype):
        shallow = copy.deepcopy(config)
        shallow.num_hidden_layers = depth
        shallow.vocab_size = 512  # codes come on top, and only their rows of the head are used
        if getattr(shallow, "layer_types", None):
            shallow.layer_types = shallow.layer_types[:depth]
        pairs.append(random_pair(shallow, tokenizer=tokenizer, codec=codec, dtype=dtype))
    costs, depths = _calibrate(pairs, layers, batch, Sampling(cfg=cfg), budget)
    dense, compressed = (model.tokens_per_image for _, model in pairs[0])
    return Plan(
        dense_tokens=dense,
        compressed_tokens=compressed,
        dense_seconds=costs.drawing(dense, compressed=False),
        compressed_seconds=costs.drawing(compressed, compressed=True),
        costs=costs,
        layers_timed=depths,
        layers=layers,
    )


def timed_depths(config: Any, dtype: torch.dtype) -> tuple[int, ...]:
    """All layers of a small language model, else two depths to extrapolate from."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv = getattr(config, "num_key_value_heads", None) or heads
    weights = 2 * config.hidden_size * width * (heads + kv)
    weights += 3 * config.hidden_size * config.intermediate_size
    least = ceil(ENOUGH / (weights * dtype.itemsize))
    if 2 * least >= config.num_hidden_layers:
        return (config.num_hidden_layers,)
    return least, 2 * least


def _calibrate(
    pairs: list[Pair], layers: int, batch: int, sampling: Sampling, budget: float
) -> tuple[Costs, tuple[int, ...]]:
    tasks: dict[str, Callable[[], object]] = {}
    depths = []
    for pair in pairs:
        assert pair.dense is not None  # built so
        depth = pair.dense.backbone.inner.config.num_hidden_layers
        depths.append(depth)
        tasks |= {f"{name}/{depth}": task for name, task in _passes(pair.dense, batch, sampling)}
    tasks |= _parts(pairs[0], batch, sampling)
    found = _medians(tasks, budget)
    short, long = (_at_depth(found, name, depths, layers) for name in ("short", "long"))
    slope = max(0.0, (long - short) / (_dense(pairs[0]).tokens_per_image - 1))
    step = StepCost(short - slope * (PROMPT + 2), slope)
    prefill = _at_depth(found, "prefill", depths, layers)
    rest = {name: found[name] for name in ("head", "decompressor", "image_decoder")}
    return Costs(step, prefill, **rest), tuple(depths)


def _at_depth(found: dict[str, float], name: str, depths: list[int], layers: int) -> float:
    """The time at full depth, on the line through the depths that were timed."""
    times = [found[f"{name}/{depth}"] for depth in depths]
    if len(depths) == 1:
        return times[0]
    slope = (times[1] - times[0]) / (depths[1] - depths[0])
    return times[0] + slope * (layers - depths[0])


def _dense(pair: Pair) -> UnifiedModel:
    assert pair.dense is not None  # built so
    return pair.dense


def _passes(
    model: UnifiedModel, batch: int, sampling: Sampling
) -> list[tuple[str, Callable[[], object]]]:
    """The prompt at once, and one step after a short and after a long context."""
    backbone, rows = model.backbone, batch * (2 if sampling.guided else 1)
    last = PROMPT + 1 + model.tokens_per_image
    weight = next(backbone.inner.parameters())
    embeds = torch.randn(rows, last, backbone.hidden_size).to(weight)
    mask = torch.ones(rows, 1, last, last, dtype=torch.bool, device=weight.device).tril()
    positions = torch.arange(last, device=weight.device).expand(rows, -1)

    def run(first: int, stop: int, cache: Any) -> object:
        seen = slice(first, stop)
        return backbone(embeds[:, seen], mask[:, :, seen, :stop], positions[:, seen], cache)

    cache = backbone.new_cache(last)
    with torch.no_grad():
        run(0, last, cache)

    def step(context: int) -> object:
        for layer in cache.layers:
            layer.filled = context
        return run(context, context + 1, cache)

    return [
        ("prefill", lambda: run(0, PROMPT + 1, backbone.new_cache(last))),
        ("short", lambda: step(PROMPT + 1)),
        ("long", lambda: step(last - 1)),
    ]


def _parts(pair: Pair, batch: int, sampling: Sampling) -> dict[str, Callable[[], object]]:
    """Head, decompressor and image decoder, which no depth changes."""
    dense, compressed = _dense(pair), pair.compressed
    assert compressed is not None  # built so
    assert compressed.codec is not None
    backbone, codec, host = dense.backbone, compressed.codec, dense.tokenizer
    weight = next(backbone.inner.parameters())
    rows = batch * (2 if sampling.guided else 1)
    hidden = torch.randn(rows, backbone.hidden_size).to(weight)
    per_token = host.spec.codes_per_token
    choose = sampling.chooser(noise(range(batch), 1, per_token)[:, 0].to(weight.device))

    def head() -> Tensor:
        codes = backbone.sample_codes(hidden, "local", choose)
        return backbone.embed_codes(codes[:, None], "local")

    size = min(codec.codebook_sizes)
    shape = (batch, compressed.tokens_per_image, per_token)
    codes = torch.randint(size, shape, generator=torch.Generator().manual_seed(0))
    codes = codes.to(host.device)
    dense_tokens = codec.decompress(codes)
    return {
        "head": head,
        "decompressor": lambda: codec.decompress(codes),
        "image_decoder": lambda: host.decode(dense_tokens),
    }


@torch.no_grad()
def _medians(tasks: dict[str, Callable[[], object]], budget: float) -> dict[str, float]:
    """Medians of interleaved rounds, as many as the budget allows; the first does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    began = now()
    for turn in range(ROUNDS + 1):
        for name, task in tasks.items():
            start = now()
            task()
            if turn:
                seconds[name].append(now() - start)
        if turn > 2 and now() - began > budget:
            break
    return {name: statistics.median(values) for name, values in seconds.items()}
