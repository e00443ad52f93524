"""A model with one code per token as a plain causal language model, for any server to draw with."""

import copy
import re
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from unicompress.backbones.base import CodeSpace
from unicompress.checkpoint import read_json, write_json
from unicompress.errors import InputError
from unicompress.sequence import ImageLayout

BEGIN, SEPARATOR, END = "<img:begin>", "<img:separator>", "<img:end>"
SLOTS = "image_slots.json"


@dataclass(frozen=True)
class Run:
    """Places of an image, one after the other, that draw from the same entries.

    Servers restrict a request to a set of entries, not each place to its own: one request a run
    does the same. A run of a delimiter is known beforehand and needs no request.
    """

    first: int  # entry of the vocabulary
    size: int  # entries
    length: int  # places

    @property
    def entries(self) -> range:
        """What is allowed."""
        return range(self.first, self.first + self.size)

    @property
    def known(self) -> list[int]:
        """The entries of all places where there is no choice, else none."""
        return [self.first] * self.length if self.size == 1 else []

    def read(self, text: str) -> list[int]:
        """Entries from the names that a server wrote; InputError unless there is one a place."""
        codes = [int(code) for code in re.findall(r"<img:(?:global:)?(\d+)>", text)]
        if len(codes) != self.length or any(code >= self.size for code in codes):
            raise InputError(
                f"{self.length} image codes below {self.size} were asked for, got {text[:80]!r}: "
                "restrict the request to the entries of the run, and ignore the end of the text"
            )
        return [self.first + code for code in codes]


def runs(folder: str | Path) -> list[Run]:
    """What follows `<img:begin>` in an exported folder, up to the end, as few requests."""
    slots = read_json(Path(folder) / SLOTS)["entries"]
    return [Run(first, size, len(list(group))) for (first, size), group in groupby(slots)]


def slot_entries(layout: ImageLayout, space: CodeSpace) -> list[tuple[int, int]]:
    """First entry and number of entries that may follow BOS, place by place up to EOS."""
    globals_ = [(space.first("global"), space.size("global"))] * layout.global_count
    locals_ = [(space.first("local"), space.size("local"))] * layout.local_count
    separator = [(space.begin + 1, 1)] if layout.global_count else []
    return [*globals_, *separator, *locals_, (space.begin + 2, 1)]


def codes_of(
    ids: Int[Tensor, "b l"], layout: ImageLayout, space: CodeSpace
) -> Int[Tensor, "b n 1"]:
    """Vocabulary entries that follow BOS (the delimiters may be among them) back to codes."""
    globals_ = ids[:, : layout.global_count] - space.first("global")
    start = layout.global_count + (1 if layout.global_count else 0)
    locals_ = ids[:, start : start + layout.local_count] - space.first("local")
    return torch.cat([globals_, locals_], dim=1)[..., None]


class ImageSlots(LogitsProcessor):
    """Allows, after BOS, only what eq. 5 has in each place; text is left alone.

    Reads `image_slots.json` of an exported folder. Pass it to `generate(logits_processor=[...])`.
    """

    def __init__(self, folder: str | Path):
        slots = read_json(Path(folder) / SLOTS)
        self.begin = int(slots["begin"])
        self.entries = [(int(first), int(count)) for first, count in slots["entries"]]

    def __call__(
        self, input_ids: Int[Tensor, "b l"], scores: Float[Tensor, "b v"]
    ) -> Float[Tensor, "b v"]:
        """Scores with everything else at minus infinity."""
        kept = scores.clone()
        for row, ids in enumerate(input_ids):
            begins = (ids == self.begin).nonzero()
            place = len(ids) - 1 - int(begins[-1]) if len(begins) else len(self.entries)
            if place < len(self.entries):
                first, count = self.entries[place]
                kept[row, :first] = -torch.inf
                kept[row, first + count :] = -torch.inf
        return kept


def export_plain_lm(
    folder: str | Path,
    *,
    lm: PreTrainedModel,
    text: PreTrainedTokenizerFast,
    space: CodeSpace,
    layout: ImageLayout,
    dtype: torch.dtype | None = None,
) -> None:
    """Write language model and tokenizer; `<img:7>` is code 7, `caption<img:begin>` the prompt.

    What follows the prompt is eq. 5: `<img:global:7>` stands for the globals where they have a
    codebook of their own. `image_slots.json` tells servers what is allowed in each place. Reading
    images is not part of the export: their continuous tokens are no vocabulary entries. Raises
    InputError for several codes per token, and for a released model whose codes are no entries of
    the vocabulary it came with.
    """
    if not space.in_vocabulary:
        raise InputError(
            "the codes of this model stand beside its vocabulary, which a plain language model "
            "cannot express: keep it as a unified model"
        )
    if space.codes_per_token != 1:
        raise InputError(
            f"only a model with one code per token is a plain language model, this one has "
            f"{space.codes_per_token}: keep it as a unified model"
        )
    folder = Path(folder)
    plain = copy.deepcopy(lm)
    if dtype is not None:
        nn.Module.to(plain, dtype)
    end = space.begin + 2
    special: dict[str, Any] = {
        "bos_token_id": text.bos_token_id,
        "eos_token_id": [i for i in (text.eos_token_id, end) if i is not None],
        "pad_token_id": text.pad_token_id,
    }
    plain.config.update(special)  # some servers stop where the configuration says
    plain.generation_config = GenerationConfig(**special, max_new_tokens=layout.length - 1)
    plain.save_pretrained(folder)
    tokenizer_with_codes(text, space).save_pretrained(folder)
    _name_for_older_readers(folder)
    write_json(
        {
            "prompt": "{caption}" + BEGIN,
            "begin": space.begin,
            "separator": space.begin + 1 if layout.global_count else None,
            "end": end,
            "global_count": layout.global_count,
            "local_rows": layout.grid.rows,
            "local_columns": layout.grid.columns,
            "entries": [list(slot) for slot in slot_entries(layout, space)],
        },
        folder / SLOTS,
    )


def _name_for_older_readers(folder: Path) -> None:
    """Add the names that transformers 4, which many servers still run on, knows things by.

    It refuses a tokenizer of class TokenizersBackend, and silently takes 10,000 for the base of
    the rotary embedding where it does not find it at the top.
    """
    path = folder / "tokenizer_config.json"
    values = read_json(path)
    if values.get("tokenizer_class") == "TokenizersBackend":
        write_json({**values, "tokenizer_class": "PreTrainedTokenizerFast"}, path)
    path = folder / "config.json"
    values = read_json(path)
    rope = values.get("rope_parameters") or {}
    if "rope_theta" in rope:
        scaled = {name: value for name, value in rope.items() if name != "rope_theta"}
        values["rope_theta"] = rope["rope_theta"]
        values["rope_scaling"] = None if rope.get("rope_type") == "default" else scaled
    if "dtype" in values:
        values["torch_dtype"] = values["dtype"]
    write_json(values, path)


def tokenizer_with_codes(
    text: PreTrainedTokenizerFast, space: CodeSpace
) -> PreTrainedTokenizerFast:
    """A copy of the text tokenizer whose added tokens are the image's entries, at their ids."""
    extended = copy.deepcopy(text)
    # Language models often have more entries than their tokenizer: the gap needs names too.
    fill = [f"<unused:{i}>" for i in range(len(text), space.text_size)]
    codes = [f"<img:{i}>" for i in range(space.local_size)]
    codes += [f"<img:global:{i}>" for i in range(space.global_size)]
    extended.add_tokens([AddedToken(t, normalized=False, special=True) for t in fill])
    delimiters = [AddedToken(t, normalized=False, special=True) for t in (BEGIN, SEPARATOR, END)]
    extended.add_tokens(delimiters, special_tokens=True)
    extended.add_tokens([AddedToken(t, normalized=False) for t in codes])
    if extended.convert_tokens_to_ids(codes[0]) != space.first_code:
        raise InputError(
            f"the text tokenizer already knows {BEGIN} or {codes[0]}: rename them before export"
        )
    return extended
