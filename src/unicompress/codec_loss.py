"""Stage one's loss (eq. 8) on the decompressor's predictions, and what is logged beside it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from unicompress.codebook import code_usage, distinct_codes_per_slot
from unicompress.codec_spec import CodecSpec
from unicompress.requantize import Requantized
from unicompress.tokenizers.base import ImageTokenizer


@dataclass(frozen=True)
class DenseTarget:
    """What the decompressor should produce for one batch, in three forms."""

    dense: Float[Tensor, "b t e"]  # continuous, on the host's manifold
    codes: Int[Tensor, "b t c"]
    rows: Float[Tensor, "b t e"]  # of these codes


@dataclass(frozen=True)
class CodecLoss:
    """Eq. 8 and what else stage one minimises; every entry of `logs` is a detached scalar."""

    total: Float[Tensor, ""]
    regression: Float[Tensor, ""]  # L_reg
    codebook: Float[Tensor, ""]  # L_cb
    commitment: Float[Tensor, ""]
    pixel: Float[Tensor, ""]  # L1 through the host's decoder; 0 where lambda_pixel is 0
    logs: dict[str, Tensor] = field(default_factory=dict)
    streams: dict[str, Requantized] = field(default_factory=dict)  # global and local


def codec_loss(
    spec: CodecSpec,
    host: ImageTokenizer,
    prediction: Tensor,  # [b t e] of the regression head, [b t c v] logits of the codes head
    target: DenseTarget,
    *,
    code_rows: Float[Tensor, "c v e"],
    pixels: Float[Tensor, "b 3 h w"],
    streams: dict[str, Requantized],
    codebook_sizes: Mapping[str, int],
    visible: Bool[Tensor, "b t"] | None = None,
) -> CodecLoss:
    """Weigh all terms; tokens that were shown to the decompressor (`visible`) do not count.

    With the codes head, L_cb is the cross-entropy to the host's dense codes, and L_reg compares the
    expected embedding with the dense target (that of the likeliest code, without gradient, where
    its weight is 0). With the regression head, L_cb is the distance to the rows of these codes.
    """
    asked = torch.ones_like(target.codes[..., 0], dtype=torch.bool) if visible is None else ~visible
    if spec.head == "codes":
        wanted = spec.lambda_reg > 0 or spec.lambda_pixel > 0
        dense = _expected(prediction, code_rows, soft=wanted)
        loss = F.cross_entropy(
            prediction[asked].flatten(0, 1).float(), target.codes[asked].flatten()
        )
        guesses: Tensor | None = prediction.detach().argmax(-1)
    else:
        dense = host.on_manifold(prediction)
        loss = F.mse_loss(dense[asked], target.rows[asked])
        guesses = _nearest(dense.detach(), code_rows)
    regression = F.mse_loss(host.on_manifold(dense)[asked], target.dense[asked])
    pixel = regression.new_zeros(())
    if spec.lambda_pixel > 0:
        pixel = F.l1_loss(host.decode(dense), pixels)
    commitment = sum((s.commitment for s in streams.values()), start=regression.new_zeros(()))
    spread = _likeness(streams["global"].tokens)
    total = (
        spec.weights[0] * regression
        + spec.weights[1] * loss
        + spec.lambda_commitment * commitment
        + spec.lambda_pixel * pixel
        + spec.lambda_spread * spread
    )
    terms = {"regression": regression, "codebook": loss, "commitment": commitment, "pixel": pixel}
    logged = {"total": total, **terms, "global_likeness": spread}
    logs = {name: value.detach() for name, value in logged.items()}
    if guesses is not None:
        logs["accuracy"] = (guesses == target.codes)[asked].float().mean()
    logs.update(_stream_logs(streams, codebook_sizes))
    return CodecLoss(total=total, **terms, logs=logs, streams=streams)


def _likeness(tokens: Float[Tensor, "b g e"]) -> Float[Tensor, ""]:
    """How alike the images' globals are, slot by slot: 1 if all point one way, 0 if balanced.

    Left alone, the globals of all images drift towards one code, which then says nothing.
    """
    if not tokens.shape[1]:
        return tokens.new_zeros(())
    return F.normalize(tokens, dim=-1).mean(dim=0).square().sum(dim=-1).mean()


def _expected(
    logits: Float[Tensor, "b t c v"], code_rows: Float[Tensor, "c v e"], *, soft: bool
) -> Float[Tensor, "b t e"]:
    """Embedding under the predicted distribution, or of its mode: a sum over a token's codes."""
    if soft:
        return torch.einsum("btcv,cve->bte", logits.softmax(-1), code_rows)
    book = torch.arange(code_rows.shape[0], device=logits.device)
    return code_rows[book, logits.detach().argmax(-1)].sum(-2)


def _nearest(
    dense: Float[Tensor, "b t e"], code_rows: Float[Tensor, "c v e"]
) -> Int[Tensor, "b t c"] | None:
    """Codes of regressed tokens, for the accuracy; None with several codes per token.

    Those would need the host's own quantiser, which reads X and not code space.
    """
    if len(code_rows) > 1:
        return None
    return torch.cdist(dense.float(), code_rows.float()).argmin(-1, keepdim=True)


def _stream_logs(streams: Mapping[str, Requantized], sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Use of the codebooks by compressed tokens, and how many codes each global slot ever takes."""
    logs: dict[str, Tensor] = {}
    for name, stream in streams.items():
        if not stream.codes.shape[1]:
            continue
        usage = code_usage(stream.codes, sizes[name])
        logs[f"{name}_usage"] = torch.tensor(usage.usage)
        logs[f"{name}_perplexity"] = torch.tensor(usage.perplexity)
    globals_ = streams["global"].codes
    if globals_.shape[1]:
        distinct = distinct_codes_per_slot(globals_).float()
        logs["global_likeness"] = _likeness(streams["global"].tokens.detach())
        logs["distinct_codes_per_slot"] = distinct.mean()
        for slot, count in enumerate(distinct.mean(-1)):
            logs[f"distinct_codes_slot_{slot}"] = count
    return logs
