"""The contract of a language model that reads and writes images."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from unicompress.accelerators.base import ImageColumns
from unicompress.registry import Family, Member
from unicompress.tokens import Grid

Stream = Literal["global", "local"]
# Takes logits of one code [b v] and the code's number within its token, gives the choice [b].
Choose = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class CodeSpace:
    """Which entries of the vocabulary stand for what: text, then BOS, SEP, EOS, then the codes.

    With several codes per token the codes have tables of their own and are no vocabulary. In a
    released model neither codes nor delimiters are (`in_vocabulary` False): its vocabulary is text.
    """

    text_size: int
    codes_per_token: int  # D
    local_size: int  # K of the local codes
    global_size: int = 0  # K_g of a separate codebook for the globals; 0: they share the local one
    in_vocabulary: bool = True

    @property
    def begin(self) -> int:
        """Entry of BOS; SEP and EOS follow."""
        return self.text_size

    @property
    def first_code(self) -> int:
        """Entry of local code 0."""
        return self.text_size + 3

    @property
    def vocabulary_size(self) -> int:
        """Entries in all."""
        if not self.in_vocabulary:
            return self.text_size
        codes = self.local_size + self.global_size if self.codes_per_token == 1 else 0
        return self.first_code + codes

    def size(self, stream: Stream) -> int:
        """Number of different codes of a stream."""
        return self.global_size if stream == "global" and self.global_size else self.local_size

    def first(self, stream: Stream) -> int:
        """Entry of code 0 of a stream (one code per token)."""
        separate = stream == "global" and self.global_size
        return self.first_code + (self.local_size if separate else 0)


@dataclass(frozen=True)
class Prompts:
    """What a language model was trained to see around image, question, answer and caption.

    Formats with one `{}`; the parts of `question` are tokenized apart. `image` may name {rows} and
    {columns}, those of the image's local tokens.
    """

    opening: str = ""  # between the text's start token and an image that is read
    question: tuple[str, ...] = ("{}", "\n")
    answer: str = "{}"
    caption: str = "{}"
    unconditional: str | None = (
        ""  # guidance's prompt; None: the same prompt, blotted out by padding
    )
    image: str = ""  # right before BOS, in whatever prompt
    bare: bool = False  # a dense image that is read has no delimiters


class Backbone(nn.Module, Member, ABC):
    """A language model with a way in for features and codes, and a way out for codes.

    `forward` gives hidden states; logits are asked for only where they are needed, because the
    vocabulary is the widest part of a small model. A member takes `lm`, `space` and `projector`,
    and keeps further options keyword-only.
    """

    codes_in_vocabulary: ClassVar[bool] = False
    reads_codes: ClassVar[bool] = False  # understanding reads what drawing writes, not features
    row_ends: ClassVar[bool] = False  # every row of local tokens ends with a fourth delimiter
    prompts: ClassVar[Prompts] = Prompts()
    space: CodeSpace
    hidden_size: int
    max_positions: int

    def take_codes(self, embed: Callable[[Tensor, Stream], Tensor]) -> None:
        """Learn how the image model embeds codes [b n c]; only some models read codes so."""

    @abstractmethod
    def embed_text(self, ids: Int[Tensor, "b l"]) -> Float[Tensor, "b l h"]:
        """Embeddings of text tokens."""

    @abstractmethod
    def delimiters(self) -> Float[Tensor, "k h"]:
        """Learned embeddings of BOS, SEP and EOS, and of the end of a row if there is one."""

    @abstractmethod
    def embed_features(
        self, globals_: Float[Tensor, "b g d"], locals_: Float[Tensor, "b m d"], grid: Grid
    ) -> Float[Tensor, "b n h"]:
        """Continuous tokens through the projector, globals first."""

    @abstractmethod
    def embed_codes(self, codes: Int[Tensor, "b n c"], stream: Stream) -> Float[Tensor, "b n h"]:
        """Codes as input of the generation path."""

    @abstractmethod
    def forward(
        self,
        embeds: Float[Tensor, "b l h"],
        mask: Bool[Tensor, "b 1 l k"] | None,
        positions: Int[Tensor, "b l"],
        cache: Any = None,
        image: ImageColumns | None = None,
    ) -> Float[Tensor, "b l h"]:
        """Hidden states; `mask` None means plainly causal; keys and values are added to `cache`.

        `image` says which keys are image tokens, for accelerators; None runs without them.
        """

    @abstractmethod
    def new_cache(self, length: int) -> Any:
        """An empty key and value cache for up to `length` positions."""

    @abstractmethod
    def text_logits(self, hidden: Float[Tensor, "*b h"]) -> Float[Tensor, "*b v"]:
        """Scores of the text entries only."""

    @abstractmethod
    def vocabulary_logits(
        self, hidden: Float[Tensor, "*b h"], start: int, stop: int
    ) -> Float[Tensor, "*b v"]:
        """Scores of entries `start` to `stop` - 1 of the vocabulary."""

    @abstractmethod
    def code_logits(
        self, hidden: Float[Tensor, "*b h"], codes: Int[Tensor, "*b c"], stream: Stream
    ) -> Float[Tensor, "*b c v"]:
        """Scores of every code of a token, each given the true codes before it in the token."""

    @abstractmethod
    def sample_codes(
        self, hidden: Float[Tensor, "b h"], stream: Stream, choose: Choose
    ) -> Int[Tensor, "b c"]:
        """The codes of one token, chosen one after the other."""


backbones: Family[Backbone] = Family("backbone", home="unicompress.backbones")
