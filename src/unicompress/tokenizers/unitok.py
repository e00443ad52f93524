"""UniTok: a ViTamin encoder and decoder around eight codebooks of unit vectors.

X is tapped after `quant_proj`, where it is 64-d: the quantiser, `post_quant_proj` and a language
model's own projector of codes then apply unchanged. Both projections are attention over the whole
picture, so `pixels` needs all dense tokens at once, and the compressed ones never pass them. The
official code has the books before the tokens, [b, D, n]; here codes are [b, n, D].

The released tokenizer is that of April 2025, with full attention in the projections; older files
have the same names and shapes but were trained with causal attention, and decode wrongly.
Source: UniTok (arXiv 2502.20321), models/unitok.py, models/quant.py.
"""

import re
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from unicompress.attention_projection import AttentionProjection
from unicompress.errors import InputError
from unicompress.tokenizers.base import HostFacts, tokenizers
from unicompress.tokenizers.fields import check_dense, check_pixels, seeded, square_grid
from unicompress.tokenizers.official import Layout, ReleasedTokenizer
from unicompress.tokenizers.vitamin import PATCH, Decoder, Encoder
from unicompress.tokens import TokenSpec

BOOK = re.compile(r"quantizer\.codebooks\.(\d+)\.codebook\.weight")


def join_books(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The codebooks of a released file, one tensor each, as `entries` [D, K, width]."""
    books = {int(m[1]): name for name in tensors if (m := BOOK.fullmatch(name))}
    rest = {name: tensor for name, tensor in tensors.items() if name not in books.values()}
    if books:
        rest["entries"] = torch.stack([tensors[books[place]] for place in sorted(books)])
    return rest


@tokenizers.register("unitok")
class UniTok(ReleasedTokenizer):
    """Multi-codebook host; the defaults are the released UniTok-Large (256 px, 16 x 16 tokens).

    `channels` are those of the two convolutional stages. There are no position embeddings, so any
    `image_size` that is a multiple of 16 can be chosen; the released weights saw 256.
    """

    facts: ClassVar[HostFacts] = HostFacts(
        licence="MIT",
        verified="official code at toy size: X and pixels within 1e-5, codes identical",
        limits="files before April 2025 decode wrongly",
    )
    layout: ClassVar[Layout] = Layout(
        files=("unitok_tokenizer.pth",),
        hub="FoundationVision/unitok_tokenizer",
        inside=("trainer.unitok", "unitok", "model", "state_dict"),
        renames=((r"encoder\.patch_embed\.backbone\.", "encoder.convolutions."),),
        ignore=(
            r"encoder\.pos_embed$",  # zeros, never trained
            r".*\.zero_k_bias$",
            r".*\.vocab_usage$",
            r"(text_encoder|fc_norm|projection)\.",  # the contrastive half
            r"logit_scale$",
        ),
        adapt=join_books,
    )

    def __init__(
        self,
        *,
        image_size: int = 256,
        width: int = 1024,
        depth: int = 31,
        heads: int = 16,
        channels: tuple[int, int] = (160, 320),
        code_dim: int = 64,
        codebooks: int = 8,
        codebook_size: int = 4096,
    ):
        super().__init__()
        if width <= code_dim:
            raise InputError(f"width {width} must be larger than code_dim {code_dim}")
        if code_dim % codebooks:
            raise InputError(f"code_dim {code_dim} does not divide into {codebooks} codebooks")
        if width % heads:
            raise InputError(
                f"width {width} is not a multiple of heads {heads}: change one of them"
            )
        self.image_size = image_size
        self.width = width
        self.depth = depth
        self.heads = heads
        self.channels = tuple(channels)
        self.code_dim = code_dim
        self.codebooks = codebooks
        self.codebook_size = codebook_size
        self.spec = TokenSpec(
            grid=square_grid(image_size, PATCH),
            dim=code_dim,
            code_dim=code_dim,
            codes_per_token=codebooks,
            codebook_size=codebook_size,
            image_size=image_size,
            manifold="chunk_l2",
        )
        self.encoder = Encoder(channels, width, depth, heads)
        self.quant_proj = AttentionProjection(width, code_dim)
        self.entries = nn.Parameter(torch.randn(codebooks, codebook_size, code_dim // codebooks))
        self.post_quant_proj = AttentionProjection(code_dim, width)
        self.decoder = Decoder(channels, width, depth, heads)

    def encode(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b t d"]:
        check_pixels(pixels, self.image_size)
        return self.quant_proj(self.encoder(pixels))

    def quantize(
        self, tokens: Float[Tensor, "b n d"]
    ) -> tuple[Int[Tensor, "b n c"], Float[Tensor, "b n e"]]:
        """Nearest by cosine, each eighth of a token in its own codebook."""
        chunks = F.normalize(tokens.unflatten(-1, (self.codebooks, -1)), dim=-1)  # [b, n, D, e/D]
        rows = F.normalize(self.entries, dim=-1)
        codes = torch.stack(
            [(chunks[:, :, book] @ rows[book].T).argmax(-1) for book in range(self.codebooks)],
            dim=-1,
        )
        return codes, self.embed(codes)

    def embed(self, codes: Int[Tensor, "b n c"]) -> Float[Tensor, "b n e"]:
        book = torch.arange(self.codebooks, device=codes.device)
        return F.normalize(self.entries[book, codes], dim=-1).flatten(-2)

    def pixels(self, dense: Float[Tensor, "b t e"]) -> Float[Tensor, "b 3 h w"]:
        check_dense(dense, self.spec.grid)
        return self.decoder(self.post_quant_proj(dense), self.spec.grid).clamp(-1, 1)

    @classmethod
    def tiny(cls) -> "UniTok":
        with seeded():
            return cls(
                image_size=64,
                width=32,
                depth=2,
                heads=4,
                channels=(4, 8),
                code_dim=16,
                codebook_size=16,
            )
