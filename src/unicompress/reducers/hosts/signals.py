"""The signals of a cut, computed from what the language model is doing, only those needed."""

from dataclasses import fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unicompress.errors import InputError
from unicompress.reducers.base import Reducer, Signals
from unicompress.reducers.hosts.attention import LayerView, received
from unicompress.reducers.hosts.books import Run
from unicompress.reducers.selection import at, cosine

TEXT = {
    "text_attention",
    "text_keys",
    "text_values",
    "text",
    "relevance",
    "text_cosines",
    "text_sines",
}


def gather_signals(
    reducer: Reducer,
    run: Run,
    group: list[int],
    view: LayerView,
    rows: Int[Tensor, " g"],
    slots: Int[Tensor, "g n"],
    tokens: Float[Tensor, "g n d"],
    slot_of: Int[Tensor, "b l"],
    valid: Bool[Tensor, "b m"],
) -> Signals:
    """Signals of a group of images; `slots` are their places in the rows they belong to."""
    signals = _encoder_signals(run, group)
    wanted = set(reducer.needs) - signals.given()
    if not wanted:
        return signals
    found: dict[str, Any] = {}
    picked = rows.tolist()
    view = LayerView(
        view.layer,
        view.hidden[rows],
        view.cosines.expand(len(view.hidden), -1, -1)[rows],
        view.sines.expand(len(view.hidden), -1, -1)[rows],
    )
    valid, slot_of = valid[rows], slot_of[rows]
    if wanted & (TEXT | {"text_valid"}):
        text_slots, text_valid = _text_slots(run, picked, slot_of)
        found["text_valid"] = text_valid
        found |= _text_signals(wanted, view, text_slots, text_valid, slots, tokens, valid)
    if reducer.source == "encoder" and wanted & {"attention", "shallow_attention"}:
        # A host without an attending encoder: the language model's first layer stands in.
        found |= dict.fromkeys(("attention", "shallow_attention"), _received(view, slots, False))
    elif "attention" in wanted:
        last = slot_of.gather(1, run.prompt.last[rows][:, None])  # [g, 1]
        weights = view.rows(last, _visible(last, valid))
        found["attention"] = _at(weights.mean(dim=1), slots)[:, 0]
    if "image_attention" in wanted:
        found["image_attention"] = _received(view, slots, True)
    inner = _inner(view, slots)
    if "keys" in wanted:
        found["keys"] = _wide(inner, "k")
    if "values" in wanted:
        found["values"] = inner.heads(inner.normed(), "v")
    if "cosines" in wanted:
        found["cosines"] = inner.cosines
    if "sines" in wanted:
        found["sines"] = inner.sines
    return replace(signals, **found)


def _inner(view: LayerView, slots: Int[Tensor, "g n"]) -> LayerView:
    """The same layer reading the tokens at `slots` alone: nothing is projected for the others."""
    tables = (view.hidden, view.cosines, view.sines)
    return LayerView(view.layer, *(at(table, slots) for table in tables))


def _received(view: LayerView, slots: Int[Tensor, "g n"], causal: bool) -> Float[Tensor, "g n"]:
    """Mean attention of the image's tokens to each other."""
    inner = _inner(view, slots)
    normed = inner.normed()
    queries, keys = inner.heads(normed, "q"), inner.heads(normed, "k")
    return received(queries, keys, view.layer.self_attn.scaling, causal=causal)


def _encoder_signals(run: Run, group: list[int]) -> Signals:
    """What the host announced, at the tokens that are left, as one batch."""
    values: dict[str, Any] = {}
    for field in fields(Signals):
        parts = [getattr(run.prompt.fields[number].encoder, field.name) for number in group]
        if parts[0] is None:
            continue
        if not isinstance(parts[0], Tensor):
            values[field.name] = parts[0]
            continue
        if not field.name.startswith("anchor"):
            parts = [p[:, run.alive[number]] for p, number in zip(parts, group, strict=True)]
        values[field.name] = torch.cat(parts)
    return Signals(**values)


def _text_signals(
    wanted: set[str],
    view: LayerView,
    text_slots: Int[Tensor, "g t"],
    text_valid: Bool[Tensor, "g t"],
    slots: Int[Tensor, "g n"],
    tokens: Float[Tensor, "g n d"],
    valid: Bool[Tensor, "g m"],
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    inner = _inner(view, text_slots)
    if "text_attention" in wanted:
        weights = view.rows(text_slots, _visible(text_slots, valid))
        index = slots[:, None, None, :].expand(*weights.shape[:3], -1)
        found["text_attention"] = weights.gather(3, index)
    if "text_keys" in wanted:
        found["text_keys"] = _wide(inner, "k")
    if "text_values" in wanted:
        found["text_values"] = inner.heads(inner.normed(), "v")
    if "text_cosines" in wanted:
        found["text_cosines"] = inner.cosines
    if "text_sines" in wanted:
        found["text_sines"] = inner.sines
    if wanted & {"text", "relevance"}:
        found["text"] = inner.hidden
    if "relevance" in wanted:
        there = text_valid[..., None].to(tokens)
        mean = (found["text"] * there).sum(dim=1, keepdim=True) / there.sum(dim=1, keepdim=True)
        found["relevance"] = cosine(tokens.float(), mean.float())[..., 0]
    return found


def _text_slots(
    run: Run, rows: list[int], slot_of: Int[Tensor, "g l"]
) -> tuple[Int[Tensor, "g t"], Bool[Tensor, "g t"]]:
    """Slots of the question's tokens, padded with the first one."""
    text = run.prompt.text[rows]
    if not bool(text.any(dim=1).all()):
        raise InputError("there is no text beside a picture, which this reducer goes by: add some")
    width = int(text.sum(dim=1).max())
    order = (~text).long().argsort(dim=1, stable=True)[:, :width]
    there = text.gather(1, order)
    order = torch.where(there, order, order[:, :1])
    return slot_of.gather(1, order), there


def _visible(slots: Int[Tensor, "g q"], valid: Bool[Tensor, "g m"]) -> Bool[Tensor, "g q m"]:
    order = torch.arange(valid.shape[1], device=valid.device)
    return (order <= slots[..., None]) & valid[:, None, :]


def _at(rows: Float[Tensor, "g q m"], slots: Int[Tensor, "g n"]) -> Float[Tensor, "g q n"]:
    return rows.gather(2, slots[:, None].expand(-1, rows.shape[1], -1))


def _wide(view: LayerView, which: str) -> Float[Tensor, "g m k"]:
    """Heads side by side."""
    return view.heads(view.normed(), which).transpose(1, 2).flatten(2)
