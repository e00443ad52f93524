"""VILA-U as released (mit-han-lab/vila-u-7b-256): config.json beside three folders.

`llm/` is an ordinary Llama whose vocabulary ends with <im_start>, <im_end>, <vi_start> and
<vi_end>; `vision_tower/` holds the image tokenizer and the depth transformer; `mm_projector/` two
linear maps. Read from vila_u_arch.py, modeling_rqtransformer.py and the changed modeling_llama.py
of the repository (arXiv 2409.04429). Natively the model reads quantised tokens, and so does this.
An image that is read stands without <im_start> and <im_end>, as in the published script, though
not in training.
"""

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from unicompress.checkpoint import read_json
from unicompress.errors import CheckpointError
from unicompress.hub import fetch_folder
from unicompress.released.base import Release, ReleaseLoader, releases
from unicompress.released.parts import (
    delimiter_rows,
    llama_text,
    mlp_state,
    read_whole,
    section,
    token_ids,
    under,
)
from unicompress.tokenizers.base import HostFacts
from unicompress.tokenizers.official import Layout, fit, read_released
from unicompress.tokenizers.vila_u import VilaU
from unicompress.tokenizers.weight_files import CONFIG, locate, read_tensors

PARTS = ("llm", "vision_tower", "mm_projector")
BEGIN, END = "<im_start>", "<im_end>"
SIGLIP_HEADS = {768: 12, 1024: 16, 1152: 16}  # by width: the released sizes of SigLIP
QUERY, BESIDE = "query.", ("query.", "key.", "value.")


def join_attention(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values of a block as one projection; the positions without their batch."""
    state = dict(tensors)
    for name in tensors:
        before, part, kind = name.rpartition(QUERY)
        names = [f"{before}{part}{kind}" for part in BESIDE]
        if part and all(n in state for n in names):
            state[f"{before}project.{kind}"] = torch.cat([state.pop(n) for n in names])
    if "positions" in state:
        state["positions"] = state["positions"][0]
    return state


HEAD = Layout(
    files=("model.safetensors",),
    prefixes=("rqtransformer.",),
    renames=(
        (r"^in_mlp_1\.", "context."),
        (r"^in_mlp_2\.", "enter."),
        (r"^pos_emb_d$", "positions"),
        (r"^classifier_mlp\.layer_norm\.", "norm."),
        (r"^classifier_mlp\.linear\.", "leave."),
        (r"^head_transformer\.", ""),
        (r"\.ln1\.", ".self_norm."),
        (r"\.ln2\.", ".mlp_norm."),
        (r"\.attn\.proj\.", ".self_attention.out."),
        (r"\.attn\.", ".self_attention."),
        (r"\.mlp\.0\.", ".mlp.inner."),
        (r"\.mlp\.2\.", ".mlp.out."),
    ),
    adapt=join_attention,
)


@releases.register("vila_u_llama")
class VilaULoader(ReleaseLoader):
    """The folder as released, 256 pixels; the tower of 384 is another architecture."""

    files: ClassVar[tuple[str, ...]] = ("*.json", "*.safetensors", "*.model")
    hub: ClassVar[str] = "mit-han-lab/vila-u-7b-256"
    title: ClassVar[str] = "vila_u"
    facts: ClassVar[HostFacts] = HostFacts(
        licence="MIT (card); the language model is a Llama 2",
        verified="official code at toy size: head within 1e-5, greedy answers and codes identical",
        limits="256 px; images, no video",
    )

    def load(self, source: Path | str, *, revision: str | None = None) -> Release:
        """All parts in single precision."""
        folder = fetch_folder(source, self.files, revision=revision)
        llm, tower, projector = _folders(folder, self.hub)
        config = read_json(tower / CONFIG)
        tokenizer = _tokenizer(tower, config)
        keys = ("embed_dim", "head")
        head = section(config, "rqtransformer", keys, tower / CONFIG)
        stack = section(head, "head", ("n_layer", "block"), tower / CONFIG)
        block = section(stack, "block", ("n_head",), tower / CONFIG)
        weights = read_released(tower, HEAD).tensors
        aligned = _projector(projector)
        lm = read_whole(LlamaForCausalLM, llm)
        text = llama_text(llm)
        state = {f"heads.local.{name}": tensor for name, tensor in weights.items()}
        state |= aligned
        state["special"] = delimiter_rows(lm, *token_ids(text, (BEGIN, END), llm, "VILA-U"))
        state["tables.local.rows"] = tokenizer.rows.expand(tokenizer.codes, -1, -1)
        return Release(
            tokenizer=tokenizer,
            lm=lm,
            text_tokenizer=text,
            backbone=f"vila_u(code_dim={tokenizer.width}, width={head['embed_dim']}, "
            f"depth={stack['n_layer']}, block_heads={block['n_head']})",
            projector=f"mlp(depth={sum(name.endswith('.weight') for name in aligned)})",
            state=state,
            understanding_source="quantized",
        )


def _folders(folder: Path, hub: str) -> list[Path]:
    """The parts as the configuration names them: a description (then the usual name) or a path."""
    config = read_json(folder / CONFIG)
    found = []
    for part in PARTS:
        named = config.get(f"{part}_cfg") if isinstance(config, dict) else None
        if named is None:
            raise CheckpointError(
                f"{folder / CONFIG} does not name {part}_cfg: it is not VILA-U's; get {hub}"
            )
        found.append(folder / (named if isinstance(named, str) else part))
    absent = [path.name for path in found if not path.is_dir()]
    if absent:
        raise CheckpointError(
            f"{folder} lacks the folder {', '.join(absent)}: fetch {hub} with its sub-folders"
        )
    return found


def _tokenizer(tower: Path, config: Any) -> VilaU:
    """The image tokenizer, in the sizes of its configuration."""
    path = tower / CONFIG
    keys = ("embed_dim", "n_embed", "latent_shape", "code_shape", "ddconfig", "pretrained_model")
    own = section(config, "rqvaesiglip", keys, path)
    decoder = section(own, "ddconfig", ("ch", "ch_mult", "z_channels"), path)
    if own.get("decoder_latent_shape") is not None:
        raise CheckpointError(
            f"{tower} resizes its tokens before decoding, as the tower of 384 pixels does, which "
            "is not supported: get vila-u-7b-256"
        )
    weights = read_released(tower, VilaU.layout)
    layers = {name.split(".")[2] for name in weights.tensors if name.startswith("encoder.layers.")}
    positions = int(own["latent_shape"][0])
    tokenizer = VilaU(
        image_size=positions * 2 ** (len(decoder["ch_mult"]) - 1),
        positions=positions,
        width=int(own["embed_dim"]),
        depth=len(layers) + 1,  # the last one has been dropped
        heads=_heads(tower, own),
        codes=int(own["code_shape"][-1]),
        codebook_size=int(own["n_embed"]),
        channels=int(decoder["ch"]),
        channel_multiplier=tuple(decoder["ch_mult"]),
        latent_channels=int(decoder["z_channels"]),
        norm_groups=min(32, int(decoder["ch"]) // 2),  # 32 wherever there are 64 channels
    )
    fit(tokenizer, weights, VilaU.layout, title="VILA-U's vision tower")
    tokenizer.freeze()
    return tokenizer


def _heads(tower: Path, own: dict[str, Any]) -> int:
    """Attention heads of SigLIP: the tower only names its model, by hub id or by a folder."""
    beside = tower / str(own["pretrained_model"]) / CONFIG
    if beside.is_file():
        vision = section(read_json(beside), "vision_config", ("num_attention_heads",), beside)
        return int(vision["num_attention_heads"])
    if own["embed_dim"] not in SIGLIP_HEADS:
        raise CheckpointError(
            f"{tower / CONFIG} does not say how many heads its SigLIP of width {own['embed_dim']} "
            f"has: put the config.json of {own['pretrained_model']} at {beside}"
        )
    return SIGLIP_HEADS[own["embed_dim"]]


def _projector(folder: Path) -> dict[str, Tensor]:
    tensors = read_tensors(locate(folder))
    state = mlp_state(under(tensors, "layers.") or under(tensors, "mm_projector.layers."))
    if not state:
        raise CheckpointError(f"{folder} holds no linear maps: VILA-U's projector is one or more")
    return {f"projector.{name}": tensor for name, tensor in state.items()}
