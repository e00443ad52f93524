"""Forward passes to measure: of a unified model on pictures, of any language model on a file."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from unicompress.accelerators.base import Task
from unicompress.checkpoint import read_json
from unicompress.errors import InputError
from unicompress.limits.attention import PADDING, SEGMENTS, Pass
from unicompress.losses import code_loss, read_text
from unicompress.sequence import SHARED, pack_text, pad_left
from unicompress.unified import UnifiedModel

SYSTEM, IMAGE, INSTRUCTION, OUTPUT = range(len(SEGMENTS))


@dataclass(frozen=True)
class Example:
    """A picture in [-1, 1], [3, h, w], with what is asked about it and what describes it."""

    pixels: Tensor
    questions: tuple[tuple[str, str], ...]  # with their answers
    caption: str


def unified_passes(
    model: UnifiedModel, examples: Sequence[Example], task: Task, *, batch: int = 8
) -> Iterator[Pass]:
    """Teacher-forced passes of a unified model, labelled with `SEGMENTS`.

    `system` is what the model adds by itself: the text's start token and the image's delimiters.
    Understanding: the image's tokens, the questions (instruction) and answers (output), none of
    which sees another question. Generation: the caption (instruction) and the image's codes
    (output). Raises InputError for a model that accelerates the task, since then not all tokens
    attend.
    """
    member = model.backbone.accelerators.get(task)
    if member is not None:
        raise InputError(
            f"this model accelerates {task} with {member}, so that not all of its tokens attend: "
            "measure a model without accelerators"
        )
    make = _reading if task == "understanding" else _drawing
    for start in range(0, len(examples), batch):
        yield make(model, examples[start : start + batch])


def _reading(model: UnifiedModel, examples: Sequence[Example]) -> Pass:
    blocks = [
        [(model._question_ids(q), model._answer_ids(a)) for q, a in example.questions]
        for example in examples
    ]
    pixels = torch.stack([example.pixels for example in examples])
    image, text = model._image_embeds(pixels), pack_text(blocks, model.tokenizer.device)
    tokens = model._token_columns(image)
    labels = torch.full((len(examples), len(tokens) + text.ids.shape[1]), PADDING)
    labels[:, : len(tokens)] = torch.where(tokens, IMAGE, SYSTEM)
    for row, block in enumerate(blocks):
        place = len(tokens)
        for question, answer in block:
            end = place + len(question) + len(answer) - 1  # the last answer token is never fed
            labels[row, place:end] = OUTPUT
            labels[row, place : place + len(question)] = INSTRUCTION
            place = end
    return Pass(lambda: read_text(model.backbone, image, text), labels.to(image.device))


def _drawing(model: UnifiedModel, examples: Sequence[Example]) -> Pass:
    prompts = [model._caption_ids(example.caption) for example in examples]
    codes = model._codes(torch.stack([example.pixels for example in examples]))
    text, marks = pad_left(prompts), model.layout.token_columns[:-1]  # EOS is never fed
    start = text.ids.shape[1]
    labels = torch.full((len(examples), start + len(marks)), PADDING)
    labels[:, :start][text.groups == SHARED] = INSTRUCTION
    for row, prompt in enumerate(prompts):
        first = start - len(prompt)
        labels[row, first : first + len(model._start())] = SYSTEM
    labels[:, start:] = torch.where(marks, OUTPUT, SYSTEM)
    layout, over = model.layout, model.config.code_loss
    return Pass(
        lambda: code_loss(model.backbone, layout, prompts, codes, over=over),
        labels.to(codes.device),
    )


def file_passes(
    path: Path | str, lm: PreTrainedModel, text: PreTrainedTokenizerFast
) -> tuple[tuple[str, ...], list[Pass]]:
    """Names of the segments and passes of a language model, from a JSON file.

    The file is a list of sequences; a sequence is a list of parts, each with `segment`, a name,
    and either `text` or `ids`: [[{"segment": "system", "text": "..."}, ...], ...]. Raises
    InputError for anything else.
    """
    sequences = read_json(Path(path))
    if not isinstance(sequences, list) or not sequences:
        raise InputError(f"{path} must hold a list of at least one sequence of segments")
    rows = [_parts(sequence, path, text) for sequence in sequences]
    names = tuple(dict.fromkeys(name for row in rows for name, _ in row))
    vocabulary = lm.get_input_embeddings().weight.shape[0]
    return names, [_file_pass(row, names, lm, vocabulary) for row in rows]


def _parts(
    sequence: Any, path: Path | str, text: PreTrainedTokenizerFast
) -> list[tuple[str, list[int]]]:
    found = []
    for part in sequence if isinstance(sequence, list) else [sequence]:
        known = isinstance(part, dict) and isinstance(part.get("segment"), str)
        if not known or ("ids" in part) == ("text" in part):
            raise InputError(
                f"{path}: every part of a sequence needs `segment` and either `text` or `ids`, "
                f"got {part!r}"
            )
        ids = part.get("ids")
        if ids is None:
            ids = text(str(part["text"]), add_special_tokens=False)["input_ids"]
        if not isinstance(ids, list) or not all(isinstance(i, int) and i >= 0 for i in ids):
            raise InputError(f"{path}: ids must be a list of token numbers, got {ids!r}")
        found.append((part["segment"], ids))
    if not any(ids for _, ids in found):
        raise InputError(f"{path} holds a sequence without tokens")
    return found


def _file_pass(
    parts: Sequence[tuple[str, list[int]]],
    names: tuple[str, ...],
    lm: PreTrainedModel,
    vocabulary: int,
) -> Pass:
    ids = [i for _, own in parts for i in own]
    if max(ids) >= vocabulary:
        raise InputError(f"token {max(ids)} is not in the vocabulary of {vocabulary} entries")
    labels = [names.index(name) for name, own in parts for _ in own]
    tokens = torch.tensor([ids], device=lm.device)
    return Pass(lambda: lm.base_model(tokens), torch.tensor([labels], device=lm.device))
