"""Residual quantisation with one shared table: what VILA-U does, and VAR within one scale."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unicompress.tokenizers.vq_parts import nearest_row


@torch.no_grad()
def residual_codes(
    tokens: Float[Tensor, "b n d"], rows: Float[Tensor, "v d"], depth: int
) -> Int[Tensor, "b n c"]:
    """`depth` codes per token: each is the row nearest to what the ones before left over."""
    rest, codes = tokens, []
    for _ in range(depth):
        codes.append(nearest_row(rest, rows)[..., 0])
        rest = rest - rows[codes[-1]]
    return torch.stack(codes, dim=-1)
