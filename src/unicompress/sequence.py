"""Eq. 5: where image, questions and answers stand in the language model's sequence."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from unicompress.accelerators.base import ImageColumns
from unicompress.tokens import Grid

IGNORED = -100  # a target that takes no part in the loss (torch's own convention)
SHARED = 0  # group of what every question may see: the image and whatever stands before it
PADDING = -1  # group of padding


@dataclass(frozen=True)
class ImageLayout:
    """[BOS] globals [SEP] locals [EOS]; without globals there is nothing to separate, so no SEP.

    With `row_ends` a fourth delimiter stands behind every row of local tokens (Emu3). A `bare`
    image has no delimiters, and no globals either; it can only be read.
    """

    global_count: int
    grid: Grid  # of the local tokens
    row_ends: bool = False
    bare: bool = False

    @property
    def local_count(self) -> int:
        """Number of local tokens, T / s^2."""
        return self.grid.length

    @property
    def tokens(self) -> int:
        """Image tokens without delimiters."""
        return self.global_count + self.local_count

    @property
    def delimiters(self) -> int:
        """BOS and EOS, SEP where there are globals, and the ends of rows where they are marked."""
        if self.bare:
            return 0
        return (3 if self.global_count else 2) + (self.grid.rows if self.row_ends else 0)

    @property
    def length(self) -> int:
        """Positions that one image takes in the language model."""
        return self.tokens + self.delimiters

    @property
    def separator(self) -> int | None:
        """Index of SEP, None without globals."""
        return self.global_count + 1 if self.global_count else None

    @property
    def predictors(self) -> list[int]:
        """Index of the position that predicts each code: the one before it."""
        return [*range(self.global_count), *(place - 1 for place in self.local_places)]

    @property
    def local_places(self) -> list[int]:
        """Index of each local token."""
        start = int(not self.bare) if self.separator is None else self.separator + 1
        step = self.grid.columns + self.row_ends  # from row to row
        rows, columns = self.grid
        return [start + step * row + column for row in range(rows) for column in range(columns)]

    def ends_row(self, token: int) -> bool:
        """Whether the end of a row follows a token (globals count from 0, then locals)."""
        place = token - self.global_count
        return self.row_ends and place >= 0 and (place + 1) % self.grid.columns == 0

    @property
    def token_columns(self) -> Bool[Tensor, " l"]:
        """True where a token of the image stands, False at its delimiters."""
        marks = torch.zeros(self.length, dtype=torch.bool)
        marks[1 : 1 + self.global_count] = True  # none where the image is bare
        marks[self.local_places] = True
        return marks

    def arrange(
        self, delimiters: Shaped[Tensor, "k d"], tokens: Shaped[Tensor, "b n d"]
    ) -> Shaped[Tensor, "b l d"]:
        """Put embeddings (or ids) of BOS, SEP, EOS and of the image's tokens in order (eq. 5).

        With `row_ends`, `delimiters` has the end of a row as its fourth.
        """
        if self.bare:
            return tokens
        begin, separator, end, *line = (row.expand(len(tokens), 1, -1) for row in delimiters)
        globals_, locals_ = tokens.split([self.global_count, self.local_count], dim=1)
        if self.row_ends:
            rows = locals_.unflatten(1, tuple(self.grid))  # [b, rows, columns, d]
            ends = line[0][:, :, None].expand(-1, self.grid.rows, -1, -1)
            locals_ = torch.cat([rows, ends], dim=2).flatten(1, 2)
        middle = [globals_, separator] if self.global_count else []
        return torch.cat([begin, *middle, locals_, end], dim=1)


def reading(columns: Bool[Tensor, " i"], length: int) -> ImageColumns:
    """An image that is read stands first among `length` keys."""
    keys = torch.zeros(length, dtype=torch.bool)
    keys[: len(columns)] = columns
    return ImageColumns("understanding", keys)


def drawing(layout: ImageLayout, before: int, length: int) -> ImageColumns:
    """An image that is drawn stands after `before` tokens of text; the first `length` keys."""
    keys = torch.cat([torch.zeros(before, dtype=torch.bool), layout.token_columns])
    return ImageColumns("generation", keys[:length])


@dataclass(frozen=True)
class PackedText:
    """Text blocks of one image side by side; every block starts again at position zero.

    `groups` numbers the blocks from 1; `targets` holds, where a position must predict an answer
    token, that token.
    """

    ids: Int[Tensor, "b l"]
    positions: Int[Tensor, "b l"]
    groups: Int[Tensor, "b l"]
    targets: Int[Tensor, "b l"]
    last: Int[Tensor, "b q"]  # index of the last token of each block; 0 where there is no block
    lengths: Int[Tensor, "b q"]  # tokens of each block; 0 where there is no block


def pack_text(
    blocks: Sequence[Sequence[tuple[list[int], list[int]]]], device: torch.device | None = None
) -> PackedText:
    """Pack (prompt ids, answer ids) of each image, padded on the right.

    The last answer id is predicted but not fed; prompts are never empty.
    """
    width = max(1, *(sum(len(p) + max(len(a) - 1, 0) for p, a in row) for row in blocks))
    count = max(1, *(len(row) for row in blocks))
    ids, positions, groups, targets, last, lengths = [], [], [], [], [], []
    for row in blocks:
        i: list[int] = []
        p: list[int] = []
        g: list[int] = []
        t: list[int] = []
        ends, sizes = [0] * count, [0] * count
        for number, (prompt, answer) in enumerate(row):
            fed = prompt + answer[:-1]
            i += fed
            p += range(len(fed))
            g += [number + 1] * len(fed)
            t += [IGNORED] * (len(fed) - len(answer)) + answer
            ends[number], sizes[number] = len(i) - 1, len(fed)
        rest = width - len(i)
        ids.append(i + [0] * rest)
        positions.append(p + [0] * rest)
        groups.append(g + [PADDING] * rest)
        targets.append(t + [IGNORED] * rest)
        last.append(ends)
        lengths.append(sizes)
    return PackedText(
        *(torch.tensor(x, device=device) for x in (ids, positions, groups, targets, last, lengths))
    )


def visible(
    queries: Int[Tensor, "b q"], keys: Int[Tensor, "b k"], *, first: int
) -> Bool[Tensor, "b 1 q k"]:
    """Which keys each query sees: earlier ones that are shared or of its own group.

    `first` is the index of the first query among the keys. Padding sees padding, so no row is
    empty (an empty row of a softmax would be NaN).
    """
    order = torch.arange(keys.shape[1], device=keys.device)
    causal = order[None, :] <= order[first : first + queries.shape[1], None]
    related = (keys[:, None, :] == SHARED) | (keys[:, None, :] == queries[:, :, None])
    return (causal & related)[:, None]


@dataclass(frozen=True)
class PaddedText:
    """Prompts padded on the left, so that what follows them stands in the same columns."""

    ids: Int[Tensor, "b l"]
    groups: Int[Tensor, "b l"]
    offsets: Int[Tensor, " b"]  # length of each prompt: the position of what follows it
    ragged: bool  # whether anything is padding; if not, a plain causal mask will do


def pad_left(prompts: Sequence[list[int]], device: torch.device | None = None) -> PaddedText:
    """Pad token ids of prompts (possibly empty) to the longest, on the left."""
    sizes = [len(p) for p in prompts]
    width = max(sizes)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    groups = torch.full((len(prompts), width), PADDING)
    for row, prompt in enumerate(prompts):
        if prompt:
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            groups[row, width - len(prompt) :] = SHARED
    return PaddedText(
        ids.to(device), groups.to(device), torch.tensor(sizes, device=device), min(sizes) < width
    )
