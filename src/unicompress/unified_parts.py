"""What a unified model is built from and stored as: its configuration, vocabulary and weights."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from unicompress.backbones.base import Backbone, CodeSpace, backbones
from unicompress.checkpoint import load_into
from unicompress.codec import ImageCodec
from unicompress.errors import CheckpointError, InputError
from unicompress.feature_taps import FeatureTap
from unicompress.tokenizers.base import ImageTokenizer

SOURCES = ("continuous", "quantized")
LOSSES = ("slot", "vocabulary")


class UnifiedConfig(PreTrainedConfig):
    """What rebuilds a unified model: its parts as plain values."""

    model_type = "unicompress"

    def __init__(
        self,
        *,
        lm: dict[str, Any] | None = None,  # the language model's own configuration
        tokenizer: str = "",  # spec of the host, as in `tokenizers.build`
        codec: dict[str, Any] | None = None,  # CodecSpec; None: the dense model
        projector: str = "local",
        understanding_source: str = "continuous",
        code_loss: str = "slot",
        text_size: int = 0,
        attention: str = "sdpa",
        backbone: str = "causal_lm",  # spec of the backbone, as in `backbones.build`
        tap: str | None = None,  # spec of a separate understanding encoder
        tap_pool: dict[str, Any] | None = None,  # options of PooledTap
        accelerators: Sequence[str] = (),  # specs, as in `accelerators.build`
        **common: Any,  # what every Hugging Face configuration has
    ):
        self.lm = lm
        self.tokenizer = tokenizer
        self.codec = codec
        self.projector = projector
        self.understanding_source = understanding_source
        self.code_loss = code_loss
        self.text_size = text_size
        self.attention = attention
        self.backbone = backbone
        self.tap = tap
        self.tap_pool = tap_pool
        self.accelerators = list(accelerators)
        super().__init__(**common)


def backbone_class(spec: str) -> type[Backbone]:
    """The class behind a backbone's spec."""
    return backbones.get(spec.partition("(")[0])


def code_space(
    text_size: int,
    tokenizer: ImageTokenizer,
    codec: ImageCodec | None,
    backbone: str = "causal_lm",
) -> CodeSpace:
    """The vocabulary of a model; a codec with its own codebooks has one range per stream."""
    inside = backbone_class(backbone).codes_in_vocabulary
    depth, size = tokenizer.spec.codes_per_token, tokenizer.spec.codebook_size
    kinds = {codec.spec.global_codebook, codec.spec.local_codebook} if codec else set()
    if codec is None or codec.spec.identity or kinds == {"shared"}:
        return CodeSpace(text_size, depth, size, in_vocabulary=inside)
    global_size, local_size = codec.codebook_sizes
    own = global_size if codec.spec.global_count else 0
    return CodeSpace(text_size, depth, local_size, own, in_vocabulary=inside)


def pool_options(tap: FeatureTap | None, codec: ImageCodec | None) -> dict[str, Any] | None:
    """How a separate understanding encoder is pooled: at the rate and in the way of the codec."""
    if tap is None or codec is None:
        return None if tap is None else {}
    spec = codec.spec
    return {
        "stride": spec.stride,
        "global_count": spec.global_count,
        "compressor": spec.compressor,
        "global_kind": spec.global_kind,
    }


def check_options(
    tokenizer: ImageTokenizer, codec: ImageCodec | None, understanding_source: str, code_loss: str
) -> None:
    """Raise InputError for parts and options that do not fit together."""
    for name, value, known in (
        ("understanding_source", understanding_source, SOURCES),
        ("code_loss", code_loss, LOSSES),
    ):
        if value not in known:
            raise InputError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if codec is not None and codec.tokenizer is not tokenizer:
        raise InputError("the codec was built around another tokenizer object: pass that one")
    if code_loss == "vocabulary" and tokenizer.spec.codes_per_token > 1:
        raise InputError(
            "code_loss 'vocabulary' needs one code per token, this tokenizer has "
            f"{tokenizer.spec.codes_per_token}: use 'slot'"
        )


def check_reading(backbone: str, understanding_source: str, tap: FeatureTap | None) -> None:
    """Raise InputError where features are wanted of a backbone that reads codes alone."""
    if backbone_class(backbone).reads_codes and (understanding_source != "quantized" or tap):
        raise InputError(
            f"the backbone {backbone} reads codes, not features: use understanding_source "
            "'quantized' and no tap"
        )


def build_lm(config: UnifiedConfig) -> PreTrainedModel:
    """The language model of a configuration, with fresh weights."""
    values = dict(config.lm or {})
    kind = str(values.pop("model_type", ""))
    if kind not in CONFIG_MAPPING:
        raise CheckpointError(
            f"unknown language model type {kind!r}: this transformers is too old or lacks it"
        )
    own = CONFIG_MAPPING[kind].from_dict(values)
    return AutoModelForCausalLM.from_config(
        own, attn_implementation=config.attention, dtype=torch.float32
    )


def tied_names(lm: PreTrainedModel) -> dict[str, str]:
    """Weights of a language model that are another one's: name -> name of the original."""
    return dict(lm.all_tied_weights_keys)


def merged_lm(lm: Any) -> PreTrainedModel:
    """The language model with its adapter, if it has one, merged into a copy of it."""
    return copy.deepcopy(lm).merge_and_unload() if hasattr(lm, "merge_and_unload") else lm


def plain_state(backbone: Any) -> dict[str, Tensor]:
    """Weights of a backbone by the names they have without adapter; tied ones once."""
    lm = merged_lm(backbone.lm)
    tied = tied_names(lm)
    own = {f"backbone.lm.{n}": t for n, t in lm.state_dict().items() if n not in tied}
    for name, child in backbone.named_children():
        if name != "lm":
            own |= child.state_dict(prefix=f"backbone.{name}.")
    for name, parameter in backbone.named_parameters(recurse=False):
        own[f"backbone.{name}"] = parameter.detach()
    return own


def untied(tensors: dict[str, Tensor], lm: PreTrainedModel) -> dict[str, Tensor]:
    """Stored weights, with tied ones under all their names."""
    names = {f"backbone.lm.{a}": f"backbone.lm.{b}" for a, b in tied_names(lm).items()}
    return {**tensors, **{a: tensors[b] for a, b in names.items() if b in tensors}}


def load_part(module: nn.Module, name: str, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy the weights of one part of a model, which stand under its name."""
    prefix = f"{name}."
    own = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
    load_into(module, own, path)
