"""UniTok's way of codes into the language model: attention to earlier tokens, then an MLP.

Read from `AttnProjection` and `TokenEmbedder` in `eval/liquid/model` of UniTok (arXiv 2502.20321).
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from unicompress.backbones.projectors import MLPProjector, Projector, projectors
from unicompress.tokens import Grid

EPS = 1e-6  # of the two inner normalisations; the others have torch's default


class CausalProjection(nn.Module):
    """Widens tokens by attention to themselves and those before, beside a linear map; then a MLP.

    A head is as wide as a token was. In the gated MLP the tokens are normalised once more.
    """

    def __init__(self, *, inside: int, heads: int):
        super().__init__()
        outside = heads * inside
        self.heads = heads
        self.attention_norm = nn.LayerNorm(inside)
        self.project = nn.Linear(inside, 3 * outside)  # queries, keys, values
        self.out = nn.Linear(outside, outside)
        self.linear_norm = nn.LayerNorm(inside)
        self.linear = nn.Linear(inside, outside)
        self.mlp_norm = nn.LayerNorm(outside)
        self.inner_norm = nn.LayerNorm(outside, eps=EPS)
        self.gate = nn.Linear(outside, 2 * outside)
        self.inner = nn.Linear(outside, 2 * outside)
        self.leave = nn.Linear(2 * outside, outside)

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n e"]:
        """The tokens of one image, in the order in which the language model reads them."""
        fused = self.project(self.attention_norm(tokens))
        parts = fused.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [3, b, h, n, d]
        mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        return self._finish(tokens, mixed.transpose(1, 2).flatten(-2))

    def each(self, tokens: Float[Tensor, "*b d"]) -> Float[Tensor, "*b e"]:
        """Every token as if it stood alone: attention to one's own value changes nothing."""
        return self._finish(tokens, self.project(self.attention_norm(tokens)).chunk(3, dim=-1)[2])

    def _finish(
        self, tokens: Float[Tensor, "*b d"], mixed: Float[Tensor, "*b e"]
    ) -> Float[Tensor, "*b e"]:
        wide = self.linear(self.linear_norm(tokens)) + self.out(mixed)
        normed = self.inner_norm(self.mlp_norm(wide))
        return wide + self.leave(F.gelu(self.gate(normed), approximate="tanh") * self.inner(normed))


@projectors.register("unitok")
class UniTokProjector(Projector):
    """Attention widens the tokens `heads` times before the MLP.

    The local tokens of an image that is read are projected as a whole, and so are the globals;
    tokens that are drawn one by one. So do the published scripts (see backbones/unitok.py).
    """

    def __init__(self, *, dim: int, hidden: int, heads: int = 16):
        super().__init__(dim=dim, hidden=hidden)
        self.heads = heads
        self.widen = CausalProjection(inside=dim, heads=heads)
        self.mlp = MLPProjector(dim=heads * dim, hidden=hidden, normed=True)
        self.mlp.norm = nn.LayerNorm(heads * dim, eps=EPS)

    def forward(
        self, globals_: Float[Tensor, "b g d"], locals_: Float[Tensor, "b m d"], grid: Grid
    ) -> Float[Tensor, "b n h"]:
        """Projected tokens, globals first; each attends to those of its stream before it."""
        wide = torch.cat([self.widen(globals_), self.widen(locals_)], dim=1)
        return self.mlp.each(wide)

    def each(self, tokens: Float[Tensor, "*b d"]) -> Float[Tensor, "*b h"]:
        """Tokens projected one by one."""
        return self.mlp.each(self.widen.each(tokens))
