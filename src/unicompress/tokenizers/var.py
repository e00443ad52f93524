"""VAR's multi-scale residual VQVAE, which VARGPT draws with.

The official code of a picture is a pyramid: at every scale, coarse to fine, what is left of the
field is pooled by area to n x n places, each place takes its nearest row, and the rows are taken
away after they went back to the full grid, bicubically, and through one of four shared 3x3
convolutions (phi).
`encode_scales`, `field_of` and `decode_scales` do exactly that.

A pyramid is no field of tokens: 155 codes at seven scales are not 64 tokens, and phi needs the
neighbours that a global token does not have. So the plug-in's own seam is simpler, and the two
meanings of s = 2 live in different places:

* *scale prefix*, the default: `prefix(codes, stride)` keeps the scales up to half the grid, 155 of
  680 codes. `field_of` and `decode_scales` take such a prefix, so it decodes without a
  decompressor. It is not joined to `ImageCodec`, whose local stream has one token per cell.
* *literal pooling*: `ImageCodec` pools X like that of any host, and `quantize` gives every token
  `codes` residual codes from the same codebook, without phi and without scales. The official
  variant of it, a shorter pyramid of the pooled field, is `pooled_scales`.

Source: VAR (arXiv 2404.02905), models/quant.py, models/vqvae.py; VARGPT keeps them as `vae_local`.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from unicompress.errors import InputError
from unicompress.tokenizers.base import HostFacts, tokenizers
from unicompress.tokenizers.fields import (
    check_pixels,
    resized,
    seeded,
    to_field,
    to_sequence,
)
from unicompress.tokenizers.ldm import ConvDecoder, ConvEncoder
from unicompress.tokenizers.official import Layout, ReleasedTokenizer
from unicompress.tokenizers.residual import residual_codes
from unicompress.tokenizers.vq_parts import nearest_row
from unicompress.tokens import Grid, TokenSpec

SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
PHIS = 4  # convolutions shared by all scales
KEPT = 0.5  # share of its input that phi passes on unchanged

Scales = list[Int[Tensor, "b _"]]  # codes per scale, coarse to fine, raster order within each


def phi_index(place: int, count: int) -> int:
    """Which of the four convolutions the scale at `place` of `count` goes through.

    At ten scales two places lie half way between two ticks, and rounding decides: numpy's ticks and
    this order of operations are the official ones.
    """
    ticks = np.linspace(1 / 3 / PHIS, 1 - 1 / 3 / PHIS, PHIS)
    return int(np.abs(ticks - place / (count - 1)).argmin())


class Phi(nn.Conv2d):
    """Half the field, half its 3x3 convolution."""

    def __init__(self, width: int):
        super().__init__(width, width, 3, padding=1)

    def forward(self, field: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h w"]:
        return KEPT * field + (1 - KEPT) * super().forward(field)


@tokenizers.register("var")
class VAR(ReleasedTokenizer):
    """Multi-scale residual host; the defaults are the released one (256 px, 16 x 16 tokens).

    X is tapped after `quant_conv` (3x3), which is code space: the decoder was trained on sums that
    approximate it. `scales` are the sides of the pyramid and end with that of the grid. `codes` is
    how many residual codes `quantize` gives a token; it is our choice, the released network has
    none. Raises InputError for scales that do not grow.
    """

    facts: ClassVar[HostFacts] = HostFacts(
        licence="MIT",
        verified="official code at toy size: X and pixels within 1e-5, codes identical",
        limits="the field is pooled; the pyramid of scales is a separate path",
    )
    layout: ClassVar[Layout] = Layout(
        files=("vae_ch160v4096z32.pth",),
        hub="FoundationVision/var",
        inside=("trainer.vae_local", "vae_local", "vae", "model", "state_dict"),
        prefixes=("vae_local.",),
        renames=(
            (r"quantize\.quant_resi\.qresi_ls\.", "phi."),
            (r"quantize\.embedding\.", "codebook."),
        ),
        ignore=(r"quantize\.ema_vocab_hit_SV$",),
    )

    def __init__(
        self,
        *,
        scales: tuple[int, ...] = SCALES,
        codes: int = 4,
        code_dim: int = 32,
        codebook_size: int = 4096,
        channels: int = 160,
        channel_multiplier: tuple[int, ...] = (1, 1, 2, 2, 4),
        norm_groups: int = 32,
    ):
        super().__init__()
        if len(scales) < 2 or any(b <= a for a, b in pairwise(scales)):
            raise InputError(f"scales must be two or more sides that grow, got {tuple(scales)}")
        self.scales = tuple(scales)
        self.codes = codes
        self.code_dim = code_dim
        self.codebook_size = codebook_size
        self.channels = channels
        self.channel_multiplier = tuple(channel_multiplier)
        self.norm_groups = norm_groups
        grid = Grid(scales[-1], scales[-1])
        self.spec = TokenSpec(
            grid=grid,
            dim=code_dim,
            code_dim=code_dim,
            codes_per_token=codes,
            codebook_size=codebook_size,
            image_size=grid.rows * 2 ** (len(channel_multiplier) - 1),
        )
        network: dict[str, Any] = {
            "channels": channels,
            "channel_multiplier": self.channel_multiplier,
            "latent_channels": code_dim,
            "norm_groups": norm_groups,
        }
        self.encoder = ConvEncoder(**network)
        self.quant_conv = nn.Conv2d(code_dim, code_dim, 3, padding=1)
        self.codebook = nn.Embedding(codebook_size, code_dim)
        self.phi = nn.ModuleList(Phi(code_dim) for _ in range(PHIS))
        self.post_quant_conv = nn.Conv2d(code_dim, code_dim, 3, padding=1)
        self.decoder = ConvDecoder(**network)

    # The seam: one token, a few residual codes

    def encode(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b t d"]:
        check_pixels(pixels, self.spec.image_size)
        return to_sequence(self.quant_conv(self.encoder(pixels)))

    def quantize(
        self, tokens: Float[Tensor, "b n d"]
    ) -> tuple[Int[Tensor, "b n c"], Float[Tensor, "b n e"]]:
        """Residual codes of each token on its own, without phi: see the module's first lines."""
        codes = residual_codes(tokens, self.codebook.weight, self.codes)
        return codes, self.embed(codes)

    def embed(self, codes: Int[Tensor, "b n c"]) -> Float[Tensor, "b n e"]:
        return self.codebook(codes).sum(-2)

    def pixels(self, dense: Float[Tensor, "b t e"]) -> Float[Tensor, "b 3 h w"]:
        field = to_field(dense, self.spec.grid)
        return self.decoder(self.post_quant_conv(field)).clamp(-1, 1)

    # The pyramid

    def encode_scales(self, pixels: Float[Tensor, "b 3 h w"]) -> Scales:
        """The official codes of pictures: one [b, side^2] per scale, 680 in all."""
        return self.scale_codes(self.encode(pixels))

    def decode_scales(self, codes: Sequence[Int[Tensor, "b _"]]) -> Float[Tensor, "b 3 h w"]:
        """Pixels in [-1, 1] of all scales, or of the first ones: coarser, never smaller."""
        return self.pixels(self.field_of(codes))

    def prefix(self, codes: Sequence[Int[Tensor, "b _"]], stride: int = 2) -> Scales:
        """The scales up to the side of the pooled grid: s = 2 keeps 155 of 680 codes.

        Raises InputError where the pyramid has no scale of that side.
        """
        return list(codes[: len(self._scales_to(stride))])

    def pooled_scales(self, dense: Float[Tensor, "b t d"], stride: int = 2) -> Scales:
        """Literal pooling: X pooled by area over stride x stride, then a pyramid of its own.

        As officially, phi is chosen by the place within the shorter pyramid, so it is not the one
        that a scale of this side was trained with. `field_of(codes, stride)` gives its field.
        """
        kept = self._scales_to(stride)
        field = resized(to_field(dense, self.spec.grid), Grid(kept[-1], kept[-1]), "area")
        return self._quantize_field(field, kept)

    def scale_codes(self, dense: Float[Tensor, "b t d"]) -> Scales:
        """The pyramid of a dense field."""
        return self._quantize_field(to_field(dense, self.spec.grid), self.scales)

    def field_of(
        self, codes: Sequence[Int[Tensor, "b _"]], stride: int = 1
    ) -> Float[Tensor, "b t e"]:
        """The sum of the scales on the grid, raster order: f-hat of the paper.

        `codes` are all scales or the first ones; with a stride, those of `pooled_scales`. Raises
        InputError for codes of another pyramid.
        """
        scales = self._scales_to(stride)
        counts, wanted = [part.shape[1] for part in codes], [side**2 for side in scales]
        if not counts or counts != wanted[: len(counts)]:
            raise InputError(
                f"the pyramid has {', '.join(map(str, wanted))} codes per scale, got "
                f"{', '.join(map(str, counts)) or 'none'}: pass all scales or the first of them"
            )
        grid = Grid(scales[-1], scales[-1])
        parts = [self._spread(part, grid, k, len(scales)) for k, part in enumerate(codes)]
        return to_sequence(torch.stack(parts).sum(0))

    def _quantize_field(
        self, field: Float[Tensor, "b d rows columns"], scales: Sequence[int]
    ) -> Scales:
        grid, rest = Grid(field.shape[-2], field.shape[-1]), field.detach()
        codes: Scales = []
        for place, side in enumerate(scales):
            pooled = to_sequence(resized(rest, Grid(side, side), "area"))
            codes.append(nearest_row(pooled, self.codebook.weight)[..., 0])
            rest = rest - self._spread(codes[-1], grid, place, len(scales))
        return codes

    def _spread(
        self, codes: Int[Tensor, "b n"], grid: Grid, place: int, count: int
    ) -> Float[Tensor, "b e rows columns"]:
        """What the codes of one scale add to the field on `grid`."""
        side = round(codes.shape[1] ** 0.5)
        rows = to_field(self.codebook(codes), Grid(side, side))
        return self._phi_of(place, count)(resized(rows, grid, "bicubic"))

    def _phi_of(self, place: int, count: int) -> nn.Module:
        """The convolution whose tick lies nearest to the scale's place between 0 and 1."""
        return self.phi[phi_index(place, count)]

    def _scales_to(self, stride: int) -> tuple[int, ...]:
        """The scales up to the side of the grid divided by the stride."""
        whole = self.scales[-1]
        fitting = {
            whole // side: k for k, side in enumerate(self.scales) if whole % side == 0 and k
        }
        if stride not in fitting:
            raise InputError(
                f"a {whole}x{whole} pyramid with the scales {', '.join(map(str, self.scales))} has "
                f"none for stride {stride}: use one of {', '.join(map(str, sorted(fitting)))}"
            )
        return self.scales[: fitting[stride] + 1]

    @classmethod
    def tiny(cls) -> "VAR":
        with seeded():
            return cls(
                scales=(1, 2, 3, 4, 6, 8),
                code_dim=8,
                codebook_size=64,
                channels=8,
                channel_multiplier=(1, 1, 2),
                norm_groups=4,
            )
