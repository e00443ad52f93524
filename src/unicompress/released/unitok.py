"""UniTok's unified model as released (FoundationVision/unitok_mllm), with its tokenizer beside it.

One folder in Hugging Face's layout, of a Llama with `model.multi_embedder` (codebooks, the way of
codes into the model) and `ar_head` (three more layers over the codes of a token); the weights may
be in bfloat16. The image tokenizer is a file of its own, unitok_tokenizer.pth. Read from
`eval/liquid` of the repository (arXiv 2502.20321); backbones/unitok.py says how its training and
its use differ, and which of the two is kept here.
"""

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from unicompress.errors import CheckpointError, InputError
from unicompress.hub import fetch_folder
from unicompress.released.base import Release, ReleaseLoader, releases
from unicompress.released.parts import (
    delimiter_rows,
    llama_text,
    mlp_state,
    quietly,
    read_whole,
    under,
)
from unicompress.tokenizers.base import HostFacts
from unicompress.tokenizers.io import load_tokenizer
from unicompress.tokenizers.official import Layout
from unicompress.tokenizers.unitok import UniTok, join_books
from unicompress.tokenizers.weight_files import locate, read_tensors

TOKENIZER, TOKENIZER_HUB = "unitok_tokenizer.pth", "FoundationVision/unitok_tokenizer"
BEGIN, END = 3, 4  # the bytes 0 and 1 in Llama 2's vocabulary, around an image
LAYERS = 3  # of the head; its other sizes are the language model's
ALIKE = 0.999  # cosine of codebook rows that differ in their rounding alone

EMBEDDER = Layout(
    prefixes=("model.multi_embedder.",),
    renames=((r"^attn_projection\.", "widen."),),
    ignore=(r".*\.vocab_usage$", r".*\.zero_k_bias$"),
    adapt=join_books,
)
HEAD = Layout(
    prefixes=("ar_head.",),
    renames=(
        (r"^linear_head\.", "leave."),
        (r"^codebooks\.", "entries."),
        (r"^(layers|norm)\.", r"trunk.\1."),
    ),
    ignore=(r".*\.rotary_emb\.inv_freq$",),
)


@releases.register("mini_gemini")
class UniTokLoader(ReleaseLoader):
    """`tokenizer` is the file unitok_tokenizer.pth, its folder or a hub id; `host` its spec.

    Where no `tokenizer` is named, it is looked for in the model's folder and in the one around
    that; a model from the hub takes it from the hub. The loader's name is the type in the released
    configuration, which UniTok has from Mini-Gemini: `release="mini_gemini(tokenizer='PATH')"`.
    """

    files: ClassVar[tuple[str, ...]] = ("*.json", "*.safetensors", "pytorch_model*.bin", "*.model")
    hub: ClassVar[str] = "FoundationVision/unitok_mllm"
    title: ClassVar[str] = "unitok"
    facts: ClassVar[HostFacts] = HostFacts(
        licence="MIT (card); the language model is a Llama 2",
        verified="official code at toy size: head within 1e-5, greedy answers and codes identical",
        limits="drawn tokens enter one by one, as in the published scripts and not as in training",
    )

    def __init__(self, *, tokenizer: str | None = None, host: str = "unitok"):
        if host.partition("(")[0] != "unitok":
            raise InputError(f"host must be unitok, with options or without, got {host}")
        self.tokenizer = tokenizer
        self.host = host

    def load(self, source: Path | str, *, revision: str | None = None) -> Release:
        """All parts in single precision."""
        folder = fetch_folder(source, self.files, revision=revision)
        embedder, head = _read(folder, EMBEDDER), _read(folder, HEAD)
        file = self.tokenizer or _beside(folder, local=Path(source).is_dir())
        tokenizer = load_tokenizer(self.host, file)
        assert isinstance(tokenizer, UniTok)  # by its spec
        _check_books(embedder.pop("entries", None), tokenizer, folder)
        with quietly():  # of the parts that have just been read
            lm = read_whole(LlamaForCausalLM, folder)
        _check_positions(lm.config, folder)
        state = {f"heads.local.{name}": tensor for name, tensor in head.items()}
        state |= _projector(embedder)
        state["special"] = delimiter_rows(lm, BEGIN, END)
        state["tables.local.rows"] = _rows(tokenizer)
        return Release(
            tokenizer=tokenizer,
            lm=lm,
            text_tokenizer=llama_text(folder),
            backbone=f"unitok(code_dim={tokenizer.code_dim}, depth={LAYERS}, "
            f"block_heads={lm.config.num_attention_heads}, "
            f"block_width={lm.config.intermediate_size}, eps={lm.config.rms_norm_eps})",
            projector=f"unitok(heads={_width(embedder, folder) // tokenizer.code_dim})",
            state=state,
            understanding_source="quantized",
        )


def _read(folder: Path, layout: Layout) -> dict[str, Tensor]:
    """One part of the checkpoint; CheckpointError where the model is another, and has none."""
    path = locate(folder, hub=UniTokLoader.hub)
    tensors = read_tensors(path, layout.wants)
    if not tensors:
        raise CheckpointError(
            f"{path} holds no {layout.prefixes[0]}*: it is another model of the type mini_gemini; "
            f"get {UniTokLoader.hub}"
        )
    return layout.ours(tensors, path)


def _beside(folder: Path, *, local: bool) -> Path | str:
    """Where the tokenizer's file lies, if nobody has said."""
    for place in (folder, folder.parent):
        if (place / TOKENIZER).is_file():
            return place / TOKENIZER
    if not local:
        return TOKENIZER_HUB
    raise CheckpointError(
        f"{folder} comes without {TOKENIZER}: fetch https://huggingface.co/{TOKENIZER_HUB}/resolve/"
        f"main/{TOKENIZER} and put it there, or name it: release=\"mini_gemini(tokenizer='PATH')\""
    )


def _check_books(entries: Tensor | None, tokenizer: UniTok, folder: Path) -> None:
    """The language model was trained on codes of one tokenizer; its copy of the books says which.

    Rows count by their direction, and a copy may have been rounded.
    """
    if entries is None or entries.shape != tokenizer.entries.shape:
        size = "none" if entries is None else list(entries.shape)
        raise CheckpointError(
            f"{folder} has codebooks of {size}, the tokenizer of {list(tokenizer.entries.shape)}: "
            f"they do not belong together; get {TOKENIZER} of {TOKENIZER_HUB}"
        )
    if F.cosine_similarity(entries, tokenizer.entries, dim=-1).min() < ALIKE:
        raise CheckpointError(
            f"the codebooks in {folder} are not the tokenizer's: it was trained with another "
            f"{TOKENIZER}; get that of {TOKENIZER_HUB}"
        )


def _check_positions(config: LlamaConfig, folder: Path) -> None:
    """The layers over the codes have Llama's plain positions here."""
    rope = config.rope_parameters or {}
    if rope.get("rope_type", "default") != "default" or rope.get("rope_theta", 1e4) != 1e4:
        raise CheckpointError(
            f"{folder} has rotary positions of another kind than UniTok's ({rope}), which its "
            "head does not support: it is another model"
        )


def _width(embedder: dict[str, Tensor], folder: Path) -> int:
    """What the codes are widened to before they are projected."""
    bias = embedder.get("widen.proj.bias")
    if bias is None:
        raise CheckpointError(
            f"{folder} lacks model.multi_embedder.attn_projection.proj.bias: fetch its files again"
        )
    return len(bias)


def _projector(embedder: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of `UniTokProjector`: attention, and an MLP whose first layer is a norm."""
    mlp = under(embedder, "mm_projector.")
    norm = under(mlp, "0.")
    maps = mlp_state({name: t for name, t in mlp.items() if not name.startswith("0.")})
    state = {f"projector.mlp.{name}": tensor for name, tensor in maps.items()}
    state |= {f"projector.mlp.norm.{name}": tensor for name, tensor in norm.items()}
    rest = {n: t for n, t in embedder.items() if not n.startswith("mm_projector.")}
    return state | {f"projector.{name}": tensor for name, tensor in rest.items()}


@torch.no_grad()
def _rows(tokenizer: UniTok) -> Tensor:
    """The books as rows [c, v, d] that are zero outside their chunk."""
    books, size, width = tokenizer.entries.shape
    rows = tokenizer.entries.new_zeros(books, size, books, width)
    places = torch.arange(books)
    rows[places, :, places] = F.normalize(tokenizer.entries, dim=-1)
    return rows.flatten(-2)
