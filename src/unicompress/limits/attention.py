"""Where attention goes, layer by layer, among the segments of a sequence.

Section 4 of "On the Limits of Token Reduction for Efficient Unified Vision Language Training"
(arXiv 2606.01503), eq. 2: alpha_S = (1/H) sum_h sum_i sum_{j in S} A_ij. As printed the sum over
queries i is not normalised and the queries are not named; here it is a mean over the queries of a
segment, the output by default, as in FastV. The maps are never stored: one layer and one block of
queries at a time.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from unicompress.errors import InputError

SEGMENTS = ("system", "image", "instruction", "output")
PADDING = -1  # label of what is never counted
BLOCK = 256  # queries at a time


@dataclass(frozen=True)
class Pass:
    """One forward pass to measure, and the segment of every token in it, -1 for padding."""

    run: Callable[[], object]
    labels: Int[Tensor, "b k"]


@dataclass(frozen=True)
class Allocation:
    """Mean attention from the queries of each segment to the keys of each segment.

    `mass[l, h, q, s]` sums to 1 over s wherever segment q has queries. In `without_sink` the first
    token of every sequence is left out and the rest sums to 1: it draws most of the attention of
    many heads whatever it says, and would hide everything else.
    """

    names: tuple[str, ...]
    mass: Float[Tensor, "l n q s"]
    without_sink: Float[Tensor, "l n q s"]
    queries: Float[Tensor, " q"]  # how many queries each segment had, in all passes
    queries_without_sink: Float[Tensor, " q"]

    def by_head(self, asked: str = "output", *, sink: bool = True) -> Float[Tensor, "l n s"]:
        """Per head: the shares of every segment in the attention of the queries asked for.

        `asked` is a segment, or `all`. Raises InputError where it has no queries.
        """
        mass, counts = self.mass, self.queries
        if not sink:
            mass, counts = self.without_sink, self.queries_without_sink
        if asked != "all":
            if asked not in self.names:
                raise InputError(f"unknown segment {asked!r}: use all, {', '.join(self.names)}")
            place = self.names.index(asked)
            counts = torch.zeros_like(counts).index_fill(0, torch.tensor([place]), counts[place])
        if not counts.sum():
            raise InputError(f"no query to measure in {asked}: choose another segment")
        return torch.einsum("lnqs,q->lns", mass, counts / counts.sum())

    def share(self, asked: str = "output", *, sink: bool = True) -> Float[Tensor, "l s"]:
        """The mean of `by_head` over heads: alpha of every layer and segment."""
        return self.by_head(asked, sink=sink).mean(dim=1)

    def redundant_from(
        self, segment: str, *, below: float = 0.1, asked: str = "output", sink: bool = True
    ) -> int | None:
        """First layer from which on a segment gets less than `below`; None where it never does.

        A candidate for `withdrawal(after=...)`.
        """
        share = self.share(asked, sink=sink)[:, self.names.index(segment)]
        above = (share >= below).nonzero()
        first = int(above[-1]) + 1 if len(above) else 0
        return first if first < len(share) else None

    def summary(self, asked: str = "output") -> dict[str, Any]:
        """For JSON: shares by layer, by head, and from segment to segment."""
        kinds = {"with_sink": True, "without_sink": False}
        return {
            "segments": list(self.names),
            "queries": asked,
            "count": dict(zip(self.names, self.queries.tolist(), strict=True)),
            "by_layer": {k: self.share(asked, sink=v).tolist() for k, v in kinds.items()},
            "by_head": {k: self.by_head(asked, sink=v).tolist() for k, v in kinds.items()},
            "between_segments": {
                "with_sink": self.mass.mean(dim=1).tolist(),
                "without_sink": self.without_sink.mean(dim=1).tolist(),
            },
        }


@torch.no_grad()
def attention_allocation(
    lm: PreTrainedModel,
    passes: Iterable[Pass],
    names: Sequence[str] = SEGMENTS,
    *,
    block: int = BLOCK,
) -> Allocation:
    """Measure the attention of a language model in some forward passes.

    Works for every model that goes through transformers' attention interface. Nothing of the
    model changes, and its outputs are those of sdpa attention while it is measured. Raises
    InputError where nothing could be measured.
    """
    recorder = _Recorder(len(names), block)
    training = lm.training
    lm.eval()
    with _recorded(lm, recorder):
        for each in passes:
            recorder.begin(each.labels)
            each.run()
            recorder.check(type(lm).__name__)
    lm.train(training)
    if not recorder.layers:
        raise InputError("no sequence was measured: give at least one")
    mass, without = (
        torch.stack([recorder.layers[number][kind] for number in sorted(recorder.layers)])
        for kind in (0, 1)
    )
    counts = recorder.counts.clamp(min=1)
    return Allocation(
        tuple(names),
        mass / counts[0][:, None],
        without / counts[1][:, None],
        recorder.counts[0],
        recorder.counts[1],
    )


class _Recorder:
    """Sums of attention over passes, one [heads, queries, keys] table per layer and kind."""

    def __init__(self, count: int, block: int):
        self.count = count
        self.block = block
        self.layers: dict[int, Float[Tensor, "2 n q s"]] = {}
        self.counts = torch.zeros(2, count, dtype=torch.float64)
        self.seen: set[int] = set()

    def begin(self, labels: Int[Tensor, "b k"]) -> None:
        """A new pass over sequences with these labels."""
        self.labels = labels
        self.sink = (labels != PADDING).int().argmax(dim=1)  # the first token that is none
        self.seen = set()
        columns = torch.arange(labels.shape[1], device=labels.device)
        rest = labels.masked_fill(columns == self.sink[:, None], PADDING)
        for kind, queries in enumerate((labels, rest)):
            found = torch.bincount(queries[queries != PADDING], minlength=self.count)
            self.counts[kind] += found.double().cpu()

    def add(
        self,
        layer: int,
        queries: Float[Tensor, "b n q d"],
        keys: Float[Tensor, "b g k d"],
        mask: Tensor | None,
        scaling: float,
    ) -> None:
        """The attention of one layer, a block of queries at a time."""
        length = self.labels.shape[1]
        if queries.shape[2] != length or keys.shape[2] != length:
            raise InputError(
                f"a layer attends from {queries.shape[2]} to {keys.shape[2]} tokens where "
                f"{length} have labels: measure full passes, without cache and accelerators"
            )
        self.seen.add(layer)
        heads, groups = queries.shape[1], keys.shape[1]
        keys = keys.repeat_interleave(heads // groups, dim=1)
        total = queries.new_zeros(2, heads, self.count, self.count, dtype=torch.float64)
        for start in range(0, length, self.block):
            stop = min(start + self.block, length)
            scores = (queries[:, :, start:stop] @ keys.transpose(2, 3)).float() * scaling
            scores = _masked(scores, mask, start)
            total += self._block(scores, start)
        known = self.layers.get(layer, torch.zeros(1, dtype=torch.float64))
        self.layers[layer] = known + total.cpu()

    def _block(self, scores: Float[Tensor, "b n q k"], start: int) -> Float[Tensor, "2 n s t"]:
        """Sums over the queries of a block, all together and then without the sink."""
        rows = torch.arange(start, start + scores.shape[2], device=scores.device)
        asking = self.labels[:, rows]
        columns = torch.arange(scores.shape[3], device=scores.device)
        sink = columns == self.sink[:, None]  # [b, k]
        found = []
        for kind in range(2):
            if kind:
                scores = scores.masked_fill(sink[:, None, None], -torch.inf)
                asking = asking.masked_fill(rows == self.sink[:, None], PADDING)
            weights = scores.softmax(dim=-1).nan_to_num(0.0)  # a row without keys is not counted
            inside = torch.einsum("bnqk,bks->bnqs", weights, self._marks(self.labels).float())
            counted = self._marks(asking).double()
            found.append(torch.einsum("bqs,bnqt->nst", counted, inside.double()))
        return torch.stack(found)

    def _marks(self, labels: Int[Tensor, "b k"]) -> Bool[Tensor, "b k s"]:
        return labels[..., None] == torch.arange(self.count, device=labels.device)

    def check(self, kind: str) -> None:
        """Raise InputError where a pass went by unseen."""
        if not self.seen:
            raise InputError(
                f"{kind} does not attend through transformers' attention interface: it cannot "
                "be measured"
            )


def _masked(
    scores: Float[Tensor, "b n q k"], mask: Tensor | None, start: int
) -> Float[Tensor, "b n q k"]:
    """Scores under a mask as attention functions get it: boolean, added, or None for causal."""
    stop = start + scores.shape[2]
    if mask is None:
        ones = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device)
        return scores.masked_fill(~ones.tril(start), -torch.inf)
    part = mask[:, :, start:stop]
    return scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part


_NAME = "unicompress_allocation"
_recorders: list[_Recorder] = []  # the one in use is the last


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers: sdpa, with a witness."""
    number, scaling = getattr(module, "layer_idx", None), options.get("scaling")
    assert isinstance(number, int)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    _recorders[-1].add(number, query, key, attention_mask, scaling)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


# A name of our own, used by no model that does not ask for it.
AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, sdpa_mask)


@contextmanager
def _recorded(lm: PreTrainedModel, recorder: _Recorder) -> Iterator[None]:
    """Let the model's attention be witnessed, and nothing else change."""
    owners = [m for m in lm.modules() if hasattr(m, "layer_idx") or m is lm.base_model]
    configs = {id(m.config): m.config for m in owners if hasattr(m, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    _recorders.append(recorder)
    try:
        for config in configs.values():
            config._attn_implementation = _NAME
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
        _recorders.pop()
