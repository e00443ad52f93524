"""Emu3 in transformers' layout (Emu3-community/Emu3-Chat-hf and -Gen-hf, BAAI's -hf folders).

transformers reads the files, those with the names of its first release too; the parts are then
taken out of its model. The text model becomes a `LlamaForCausalLM`, which computes the same but for
a dropout of 0.1 on every residual in training, so that all that works on a Llama works here.
backbones/emu3.py says how pictures stand in the sequence.
"""

import re
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import (
    Emu3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from unicompress.checkpoint import load_into, read_json
from unicompress.errors import CheckpointError
from unicompress.hub import fetch_folder
from unicompress.released.base import Release, ReleaseLoader, releases
from unicompress.released.parts import PROCESSOR, read_whole, token_ids
from unicompress.tokenizers.base import HostFacts
from unicompress.tokenizers.emu3 import Emu3
from unicompress.tokenizers.weight_files import CONFIG

BEGIN, LINE_END, FIELD_END = "<|image token|>", "<|extra_200|>", "<|extra_201|>"
FRAME = ("<|image start|>", "<|image end|>")  # around them; backbones/emu3.py writes them as text
SAME = (  # fields of the text model's configuration that are Llama's
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
VISUAL = re.compile(r"<\|visual token (\d+)\|>")


@releases.register("emu3")
class Emu3Loader(ReleaseLoader):
    """`rows` and `columns` of dense tokens, 8 x 8 pixels each; released pictures have 90 x 90.

    Emu3 takes any grid, a `UnifiedModel` has one: `release="emu3(rows=32, columns=32)"` is for
    pictures of 256 x 256 pixels. Give the grid of the tokenizer that a plug-in was trained around.
    """

    files: ClassVar[tuple[str, ...]] = ("*.json", "*.safetensors")
    hub: ClassVar[str] = "Emu3-community/Emu3-Gen-hf"
    facts: ClassVar[HostFacts] = HostFacts(
        licence="Apache-2.0",
        verified="transformers' model at toy size: logits within 1e-5; answers, and codes with "
        "and without guidance, identical",
        limits="Emu3-Chat answers and Emu3-Gen draws: two checkpoints; one grid per model",
    )

    def __init__(self, *, rows: int = 90, columns: int = 90):
        self.rows, self.columns = rows, columns

    def load(self, source: Path | str, *, revision: str | None = None) -> Release:
        """All parts in single precision."""
        folder = fetch_folder(source, self.files, revision=revision)
        first, codes = _visual_range(folder)
        _check_processor(folder)
        whole = read_whole(Emu3ForConditionalGeneration, folder)
        text = PreTrainedTokenizerFast.from_pretrained(folder)
        if codes != whole.config.vq_config.codebook_size:
            raise CheckpointError(
                f"{folder / CONFIG} names {codes} visual tokens for a codebook of "
                f"{whole.config.vq_config.codebook_size}: fetch it again"
            )
        return Release(
            tokenizer=self._tokenizer(whole, folder),
            lm=_llama(whole),
            text_tokenizer=text,
            backbone=f"emu3(first_code={first}, codes={codes})",
            projector="linear",  # not kept by the backbone, which reads codes
            state={"special": _special(whole, text, folder)},
            understanding_source="quantized",
        )

    def _tokenizer(self, whole: Any, folder: Path) -> Emu3:
        vq = whole.config.vq_config
        tokenizer = Emu3(
            rows=self.rows,
            columns=self.columns,
            base_channels=vq.base_channels,
            channel_multiplier=tuple(vq.channel_multiplier),
            code_dim=vq.embed_dim,
            codebook_size=vq.codebook_size,
            res_blocks=vq.num_res_blocks,
        )
        load_into(tokenizer.vq, whole.model.vqmodel.state_dict(), folder)
        tokenizer.freeze()
        return tokenizer


def _visual_range(folder: Path) -> tuple[int, int]:
    """First entry and number of the visual tokens, which stand in one range in all releases."""
    values = read_json(folder / CONFIG)
    entries = values.get("vocabulary_map") if isinstance(values, dict) else None
    found = [
        (int(match[1]), entry)
        for name, entry in (entries or {}).items()
        if (match := VISUAL.fullmatch(name))
    ]
    found.sort()
    wanted = [(code, found[0][1] + code) for code in range(len(found))]
    if not found or found != wanted:
        raise CheckpointError(
            f"{folder / CONFIG} has no vocabulary_map with all visual tokens in order: it is not "
            "that of an Emu3 which transformers can read"
        )
    return found[0][1], len(found)


def _check_processor(folder: Path) -> None:
    """The host reads pixels in [-1, 1], which all releases ask for."""
    path = folder / PROCESSOR
    values = read_json(path) if path.is_file() else {}
    for key in ("image_mean", "image_std"):
        if any(value != 0.5 for value in values.get(key, ())):
            raise CheckpointError(
                f"{path} asks for {key} {values[key]}; this host only knows 0.5: it is not the "
                "image processor of Emu3"
            )


def _special(whole: Any, text: PreTrainedTokenizerFast, folder: Path) -> Tensor:
    """BOS, SEP, EOS and the end of a row; SEP starts as the end of a row."""
    names = (BEGIN, LINE_END, FIELD_END, LINE_END)
    ids = token_ids(text, (*names, *FRAME), folder, "Emu3")
    rows = whole.get_input_embeddings().weight
    return rows[torch.tensor(ids[: len(names)])].detach().clone()


def _llama(whole: Any) -> PreTrainedModel:
    """The text model with its head as a Llama; weights are handed over, not copied."""
    trunk, head = whole.model.text_model, whole.lm_head
    config = LlamaConfig(
        **{name: getattr(whole.config.text_config, name) for name in SAME},
        tie_word_embeddings=head.weight is trunk.get_input_embeddings().weight,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        lm = LlamaForCausalLM(config)
    lm.model.load_state_dict(trunk.state_dict(), assign=True)
    lm.lm_head.load_state_dict(head.state_dict(), assign=True)
    lm.tie_weights()
    lm.model.rotary_emb = LlamaRotaryEmbedding(config)  # its table is no stored weight
    return lm.eval()
