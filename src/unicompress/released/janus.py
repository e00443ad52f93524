"""Janus and Janus-Pro in transformers' layout (deepseek-community/Janus-Pro-1B and -7B).

transformers reads the files; the parts are then taken out of its model and put into our seams:
SigLIP becomes a `FeatureTap`, the VQ a tokenizer, Llama with its head an ordinary causal LM.
"""

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    JanusForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from unicompress.checkpoint import read_json
from unicompress.feature_taps import JanusSiglip
from unicompress.hub import fetch_folder
from unicompress.released.base import Release, ReleaseLoader, releases
from unicompress.released.parts import PROCESSOR, delimiter_rows, read_whole, token_ids
from unicompress.tokenizers.base import HostFacts
from unicompress.tokenizers.janus_vq import JanusVQ

BEGIN, END = "<begin_of_image>", "<end_of_image>"


@releases.register("janus")
class JanusLoader(ReleaseLoader):
    """transformers >= 5.18 names; the deepseek-ai originals are another layout."""

    files: ClassVar[tuple[str, ...]] = ("*.json", "*.safetensors")
    hub: ClassVar[str] = "deepseek-community/Janus-Pro-1B"
    facts: ClassVar[HostFacts] = HostFacts(
        licence="MIT (card); DeepSeek model licence beside it",
        verified="transformers' model at toy size: answers, and codes with guidance, identical",
    )

    def load(self, source: Path | str, *, revision: str | None = None) -> Release:
        """All parts in single precision."""
        folder = fetch_folder(source, self.files, revision=revision)
        whole = read_whole(JanusForConditionalGeneration, folder)
        text = PreTrainedTokenizerFast.from_pretrained(folder)
        ids = token_ids(text, (BEGIN, END), folder, "Janus")
        vq = whole.config.vq_config
        return Release(
            tokenizer=_tokenizer(whole),
            lm=causal_lm(whole, whole.config.text_config),
            text_tokenizer=text,
            backbone=f"janus(code_dim={vq.embed_dim}, depth={vq.num_hidden_layers})",
            projector=f"mlp(depth={whole.config.vision_config.depth})",
            state=_state(whole, delimiter_rows(whole, *ids)),
            tap=_tap(whole, folder),
        )


def causal_lm(whole: Any, config: Any) -> PreTrainedModel:
    """The language model of a multimodal one with its head, as a causal LM; nothing is copied."""
    trunk, head = whole.model.language_model, whole.lm_head
    config.tie_word_embeddings = head.weight is trunk.get_input_embeddings().weight
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    setattr(lm, lm.base_model_prefix, trunk)
    lm.set_output_embeddings(head)
    return lm


def _tokenizer(whole: Any) -> JanusVQ:
    vq, vision = whole.config.vq_config, whole.config.vision_config
    tokenizer = JanusVQ(
        image_size=vision.image_size,
        patch=1,
        base_channels=vq.base_channels,
        channel_multiplier=tuple(vq.channel_multiplier),
        latent_channels=vq.latent_channels,
        code_dim=vq.embed_dim,
        codebook_size=vq.num_embeddings,
        res_blocks=vq.num_res_blocks,
    )
    tokenizer.vq.load_state_dict(whole.model.vqmodel.state_dict())
    tokenizer.freeze()
    return tokenizer


def _tap(whole: Any, folder: Path) -> JanusSiglip:
    """The encoder, with the normalisation of the image processor that was released with it."""
    processor = read_json(folder / PROCESSOR) if (folder / PROCESSOR).is_file() else {}
    ranges = {
        name: tuple(processor[key])
        for name, key in (("mean", "image_mean"), ("std", "image_std"))
        if key in processor
    }
    known = vars(type(whole.config.vision_config)())
    changed = whole.config.vision_config.to_diff_dict()
    vision = {k: v for k, v in changed.items() if k in known and _plain(k)}
    tap = JanusSiglip(vision=vision, **ranges)
    tap.encoder.load_state_dict(whole.model.vision_model.state_dict())
    return tap


def _plain(name: str) -> bool:
    return not name.startswith(("_", "transformers", "dtype", "architectures", "model_type"))


def _state(whole: Any, special: Tensor) -> dict[str, Tensor]:
    own = whole.model
    state = {"special": special}
    state |= _named(own.aligner.state_dict(), "projector.")
    state |= {"tables.local.entries.weight": own.generation_embeddings.weight.detach()}
    state |= _named(own.generation_aligner.state_dict(), "tables.local.aligner.")
    names = {"proj_out": "enter", "vision_head": "leave"}
    for name, tensor in own.generation_head.state_dict().items():
        part, kind = name.split(".")
        state[f"heads.local.{names[part]}.{kind}"] = tensor
    return state


def _named(mlp: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights of an aligner under the names of `MLPProjector`."""
    state = {}
    for name, tensor in mlp.items():
        *part, kind = name.split(".")
        number = 0 if part == ["fc1"] else int(part[1]) + 1
        state[f"{prefix}layers.{number}.{kind}"] = tensor
    return state
