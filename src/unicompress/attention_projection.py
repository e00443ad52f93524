"""UniTok's change of a token's width: attention beside a linear map, then a gated MLP.

Its tokenizer goes down to code space and back up so, and its language model reads codes so. Modules
are named as in the checkpoints. Source: UniTok (arXiv 2502.20321), `AttnProjection` of
models/vqvae.py and of eval/liquid/model/quant.py.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from unicompress.errors import InputError

EPS = 1e-6  # of most normalisations here; those around the change of width have torch's default


class GatedMLP(nn.Module):
    """GELU-gated (tanh form), with a normalisation of its own besides the block's."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.w0 = nn.Linear(width, hidden)
        self.w1 = nn.Linear(width, hidden)
        self.w2 = nn.Linear(hidden, width)

    def forward(self, tokens: Float[Tensor, "*b w"]) -> Float[Tensor, "*b w"]:
        tokens = self.norm(tokens)
        return self.w2(F.gelu(self.w0(tokens), approximate="tanh") * self.w1(tokens))


def split_heads(
    fused: Float[Tensor, "b n w3"], heads: int
) -> tuple[Float[Tensor, "b h n k"], Float[Tensor, "b h n k"], Float[Tensor, "b h n k"]]:
    """A fused projection to queries, keys and values by head."""
    parts = fused.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # [3, b, heads, n, width]
    return parts[0], parts[1], parts[2]


class ProjectingAttention(nn.Module):
    """Attention that changes the width: heads are averaged on the way down, joined on the way up.

    The smaller width is that of one head. Keys have no bias; the released zeros for it are dropped.
    """

    def __init__(self, inside: int, outside: int, *, causal: bool = False):
        super().__init__()
        wide, narrow = max(inside, outside), min(inside, outside)
        self.down = inside > outside
        self.causal = causal
        self.heads = wide // narrow
        self.qkv = nn.Linear(inside, 3 * wide, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(wide))
        self.v_bias = nn.Parameter(torch.zeros(wide))
        self.proj = nn.Linear(outside, outside)

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n e"]:
        parts = split_heads(self._fused(tokens), self.heads)
        mixed = F.scaled_dot_product_attention(*parts, is_causal=self.causal)
        joined = mixed.mean(dim=1) if self.down else mixed.transpose(1, 2).flatten(-2)
        return self.proj(joined)

    def each(self, tokens: Float[Tensor, "*b d"]) -> Float[Tensor, "*b e"]:
        """On the way up, every token alone: attention to one's own value changes nothing."""
        return self.proj(self._fused(tokens).chunk(3, dim=-1)[2])

    def _fused(self, tokens: Float[Tensor, "*b d"]) -> Float[Tensor, "*b w3"]:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return F.linear(tokens, self.qkv.weight, bias)


class AttentionProjection(nn.Module):
    """Changes the width by attention beside a linear map, then a gated MLP.

    It reads the whole sequence, or with `causal` the tokens before, so it is not to be applied to a
    part of it. Raises InputError unless one width is a multiple of the other.
    """

    def __init__(self, inside: int, outside: int, *, causal: bool = False):
        super().__init__()
        wide, narrow = max(inside, outside), min(inside, outside)
        if wide % narrow:
            raise InputError(f"width {wide} must be a multiple of code_dim {narrow}: change one")
        self.norm1 = nn.LayerNorm(inside)
        self.attn = ProjectingAttention(inside, outside, causal=causal)
        self.proj = nn.Linear(inside, outside)
        self.norm3 = nn.LayerNorm(inside)
        self.norm2 = nn.LayerNorm(outside)
        self.mlp = GatedMLP(outside, 2 * outside)

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n e"]:
        return self._finish(tokens, self.attn(self.norm1(tokens)))

    def each(self, tokens: Float[Tensor, "*b d"]) -> Float[Tensor, "*b e"]:
        """On the way up, every token as if it stood alone."""
        return self._finish(tokens, self.attn.each(self.norm1(tokens)))

    def _finish(
        self, tokens: Float[Tensor, "*b d"], mixed: Float[Tensor, "*b e"]
    ) -> Float[Tensor, "*b e"]:
        wide = self.proj(self.norm3(tokens)) + mixed
        return wide + self.mlp(self.norm2(wide))
