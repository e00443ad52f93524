"""What stage two minimises: cross-entropy of answers to an image and of codes to a caption."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from unicompress.backbones.base import Backbone, Stream
from unicompress.sequence import (
    IGNORED,
    SHARED,
    ImageLayout,
    PackedText,
    drawing,
    pad_left,
    reading,
    visible,
)


@dataclass(frozen=True)
class LossOutput:
    """A loss to minimise and detached figures to log; `logs["tokens"]` counts the predictions."""

    loss: Float[Tensor, ""]
    logs: dict[str, float | Tensor]


def answer_loss(
    backbone: Backbone,
    image: Float[Tensor, "b i h"],
    text: PackedText,
    columns: Bool[Tensor, " i"] | None = None,
) -> LossOutput:
    """Cross-entropy of the answers; logits are computed where there is a target only.

    Every answer weighs the same: a mean over tokens would give a caption of twenty words the
    weight of ten short answers, and short answers were learned last for it. `columns` marks the
    image's tokens among its embeddings, see `read_text`.
    """
    states = read_text(backbone, image, text, columns)
    wanted = text.targets != IGNORED
    targets = text.targets[wanted]
    logits = backbone.text_logits(states[wanted]).float()
    entropy = F.cross_entropy(logits, targets, reduction="none")
    right = logits.detach().argmax(dim=-1) == targets
    row, column = wanted.nonzero(as_tuple=True)
    place = (row, text.groups[row, column])
    lengths, missed = (
        entropy.new_zeros(len(wanted), text.last.shape[1] + 1).index_put(place, each, True)
        for each in (torch.ones_like(entropy), (~right).to(entropy))
    )
    answers = lengths > 0
    loss = (entropy / lengths[place]).sum() / answers.sum()
    return LossOutput(
        loss,
        {
            "loss": loss.detach(),
            "tokens": float(len(targets)),
            "accuracy": right.float().mean(),
            "answers": (missed[answers] == 0).float().mean(),
        },
    )


def read_text(
    backbone: Backbone,
    image: Float[Tensor, "b i h"],
    text: PackedText,
    columns: Bool[Tensor, " i"] | None = None,
) -> Float[Tensor, "b l h"]:
    """Hidden states of the packed text behind an image, each block blind to the others.

    `columns` (on the CPU) marks the image's tokens, for accelerators; None reads without them.
    """
    before = image.shape[1]
    places = torch.arange(before, device=image.device).expand(len(image), -1)
    groups = torch.cat([torch.full_like(places, SHARED), text.groups], dim=1)
    hidden = backbone(
        torch.cat([image, backbone.embed_text(text.ids).to(image)], dim=1),
        visible(groups, groups, first=0),
        torch.cat([places, text.positions + before], dim=1),
        image=None if columns is None else reading(columns, groups.shape[1]),
    )
    return hidden[:, before:]


def code_loss(
    backbone: Backbone,
    layout: ImageLayout,
    prompts: Sequence[list[int]],
    codes: Int[Tensor, "b n c"],
    *,
    over: str = "slot",
) -> LossOutput:
    """Cross-entropy of an image's codes after its prompt (token ids, possibly none).

    `over` says among what a code competes: the codes possible in its place (`slot`), or the whole
    vocabulary, delimiters being targets too (`vocabulary`; one code per token).
    """
    text = pad_left(prompts, codes.device)
    globals_, locals_ = codes.split([layout.global_count, layout.local_count], dim=1)
    tokens = torch.cat(
        [backbone.embed_codes(globals_, "global"), backbone.embed_codes(locals_, "local")], dim=1
    )
    image = layout.arrange(backbone.delimiters(), tokens)[:, :-1]  # EOS predicts nothing
    start = text.ids.shape[1]
    groups = torch.cat([text.groups, text.groups.new_full(image.shape[:2], SHARED)], dim=1)
    columns = torch.arange(groups.shape[1], device=codes.device)
    hidden = backbone(
        torch.cat([backbone.embed_text(text.ids), image], dim=1),
        visible(groups, groups, first=0) if text.ragged else None,
        (columns + (text.offsets - start)[:, None]).clamp(min=0),
        image=drawing(layout, start, groups.shape[1]),
    )[:, start:]
    if over == "vocabulary":
        return _vocabulary_loss(backbone, layout, hidden, codes)
    return _slot_loss(backbone, hidden[:, layout.predictors], globals_, locals_)


def _slot_loss(
    backbone: Backbone,
    states: Float[Tensor, "b n h"],
    globals_: Int[Tensor, "b g c"],
    locals_: Int[Tensor, "b m c"],
) -> LossOutput:
    split, count = globals_.shape[1], globals_.numel() + locals_.numel()
    parts: tuple[tuple[Stream, Tensor, Tensor], ...] = (
        ("global", states[:, :split], globals_),
        ("local", states[:, split:], locals_),
    )
    total = right = torch.zeros((), device=states.device)
    logs: dict[str, float | Tensor] = {}
    for stream, hidden, codes in parts:
        if not codes.numel():
            continue
        logits = backbone.code_logits(hidden, codes, stream).float().flatten(0, -2)
        entropy = F.cross_entropy(logits, codes.flatten(), reduction="sum")
        logs[f"loss_{stream}"] = entropy.detach() / codes.numel()
        total = total + entropy
        right = right + (logits.detach().argmax(dim=-1) == codes.flatten()).sum()
    loss = total / count
    return LossOutput(
        loss, {"loss": loss.detach(), "tokens": float(count), "accuracy": right / count, **logs}
    )


def _vocabulary_loss(
    backbone: Backbone,
    layout: ImageLayout,
    hidden: Float[Tensor, "b l h"],
    codes: Int[Tensor, "b n 1"],
) -> LossOutput:
    targets = image_ids(backbone, layout, codes)[:, 1:]
    logits = backbone.vocabulary_logits(hidden, 0, backbone.space.vocabulary_size).float()
    entropy = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    right = (logits.detach().argmax(dim=-1) == targets).float()[:, layout.predictors]
    loss = entropy.mean()
    each = entropy.detach().view_as(targets)[:, layout.predictors]
    logs: dict[str, float | Tensor] = {
        "loss": loss.detach(),
        "tokens": float(targets.numel()),
        "accuracy": right.mean(),
        "loss_local": each[:, layout.global_count :].mean(),
    }
    if layout.global_count:
        logs["loss_global"] = each[:, : layout.global_count].mean()
    return LossOutput(loss, logs)


def image_ids(
    backbone: Backbone, layout: ImageLayout, codes: Int[Tensor, "b n 1"]
) -> Int[Tensor, "b l"]:
    """The vocabulary entries of eq. 5: BOS, globals, SEP, locals, EOS; one code per token."""
    space, entries = backbone.space, codes.clone()
    entries[:, : layout.global_count] += space.first("global")
    entries[:, layout.global_count :] += space.first("local")
    delimiters = torch.arange(space.begin, space.begin + 3, device=codes.device)[:, None]
    return layout.arrange(delimiters, entries)[..., 0]
