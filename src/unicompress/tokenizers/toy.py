"""Hosts of a few kilobytes with 1, 4 and 8 codes per token, for tests: they draw nothing useful."""

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from unicompress.errors import InputError
from unicompress.tokenizers.base import ImageTokenizer, tokenizers
from unicompress.tokens import Grid, TokenSpec

PATCH = 4  # pixels per token and side


class _Toy(ImageTokenizer):
    """What the toys share: one patch convolution in, one out; subclasses bring the quantiser.

    Any picture whose sides are multiples of 4 can be encoded; `decode` takes the grid of the spec.
    Weights follow from `seed` alone.
    """

    codes_per_token: int
    manifold: str
    wide: bool  # whether X is wider than code space, as where it is tapped before a projection

    def __init__(self, *, rows: int = 4, columns: int = 6, codebook_size: int = 16, seed: int = 0):
        super().__init__()
        if codebook_size < 2:
            raise InputError(f"codebook_size must be at least 2, got {codebook_size}")
        self.rows, self.columns = rows, columns
        self.codebook_size = codebook_size
        self.seed = seed
        self.spec = TokenSpec(
            grid=Grid(rows, columns),
            dim=12 if self.wide else 16,
            code_dim=4 if self.wide else 16,
            codes_per_token=self.codes_per_token,
            codebook_size=codebook_size,
            image_size=PATCH * rows,
            manifold=self.manifold,
        )
        with torch.random.fork_rng(devices=[]):  # torch draws weights of its own on construction
            self._build(self.spec)
        self._initialize(torch.Generator().manual_seed(seed))

    def _build(self, spec: TokenSpec) -> None:
        self.encoder = nn.Conv2d(3, spec.dim, PATCH, PATCH)
        self.projection = nn.Linear(spec.dim, spec.code_dim) if self.wide else nn.Identity()
        self.decoder = nn.ConvTranspose2d(spec.code_dim, 3, PATCH, PATCH)
        width = spec.code_dim // (spec.codes_per_token if spec.manifold == "chunk_l2" else 1)
        self.entries = nn.Parameter(torch.empty(spec.codes_per_token, spec.codebook_size, width))

    def _initialize(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            for weight in self.parameters():
                fan = weight[0].numel() if weight.ndim > 1 else 1
                weight.copy_(torch.randn(weight.shape, generator=generator) / fan**0.5)

    def encode(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b t d"]:
        if pixels.shape[-2] % PATCH or pixels.shape[-1] % PATCH:
            raise InputError(
                f"height and width must be multiples of {PATCH}, got "
                f"{pixels.shape[-2]}x{pixels.shape[-1]}: resize the image"
            )
        return rearrange(self.encoder(pixels), "b d rows columns -> b (rows columns) d")

    def dense_target(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n e"]:
        return self.projection(tokens)

    def pixels(self, dense: Float[Tensor, "b t e"]) -> Float[Tensor, "b 3 h w"]:
        grid = self.spec.grid
        if dense.shape[1] != grid.length:
            raise InputError(
                f"the decoder takes {grid.length} dense tokens ({grid.rows}x{grid.columns}), "
                f"got {dense.shape[1]}"
            )
        field = rearrange(dense, "b (rows columns) e -> b e rows columns", rows=grid.rows)
        return self.decoder(field).tanh()

    @classmethod
    def tiny(cls) -> "_Toy":
        return cls()


@tokenizers.register("toy_single")
class ToySingle(_Toy):
    """One cosine code per token and unit vectors, as in LlamaGen and Janus."""

    codes_per_token, manifold, wide = 1, "l2", True

    def quantize(
        self, tokens: Float[Tensor, "b n d"]
    ) -> tuple[Int[Tensor, "b n c"], Float[Tensor, "b n e"]]:
        rows = F.normalize(self.entries[0], dim=-1)
        codes = (self.projection(tokens) @ rows.T).argmax(-1, keepdim=True)
        return codes, self.embed(codes)

    def embed(self, codes: Int[Tensor, "b n c"]) -> Float[Tensor, "b n e"]:
        return F.normalize(self.entries[0], dim=-1)[codes[..., 0]]


@tokenizers.register("toy_residual")
class ToyResidual(_Toy):
    """Four codes per token, each quantising what the ones before left over, as in VILA-U."""

    codes_per_token, manifold, wide = 4, "none", False

    def quantize(
        self, tokens: Float[Tensor, "b n d"]
    ) -> tuple[Int[Tensor, "b n c"], Float[Tensor, "b n e"]]:
        rest, codes = tokens, []
        for rows in self.entries:
            codes.append(torch.cdist(rest, rows[None]).argmin(-1))
            rest = rest - rows[codes[-1]]
        stacked = torch.stack(codes, dim=-1)
        return stacked, self.embed(stacked)

    def embed(self, codes: Int[Tensor, "b n c"]) -> Float[Tensor, "b n e"]:
        depth = torch.arange(self.codes_per_token, device=codes.device)
        return self.entries[depth, codes].sum(-2)


@tokenizers.register("toy_multi")
class ToyMulti(_Toy):
    """Eight codes per token, one for each chunk of it, unit vectors by chunk, as in UniTok."""

    codes_per_token, manifold, wide = 8, "chunk_l2", False

    def quantize(
        self, tokens: Float[Tensor, "b n d"]
    ) -> tuple[Int[Tensor, "b n c"], Float[Tensor, "b n e"]]:
        chunks = tokens.unflatten(-1, (self.codes_per_token, -1))  # [b, n, D, e / D]
        rows = F.normalize(self.entries, dim=-1)
        codes = torch.einsum("bnce,cve->bncv", chunks, rows).argmax(-1)
        return codes, self.embed(codes)

    def embed(self, codes: Int[Tensor, "b n c"]) -> Float[Tensor, "b n e"]:
        book = torch.arange(self.codes_per_token, device=codes.device)
        return F.normalize(self.entries, dim=-1)[book, codes].flatten(-2)
