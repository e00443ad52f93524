"""A codebook of our own: quantising (eq. 4), looking up (eq. 6), and how well it is used."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from unicompress.errors import InputError

METRICS = ("l2", "cosine")
RARE = 0.05  # a row below this share of the mean use counts as dead


def straight_through(
    tokens: Float[Tensor, "*b d"], quantized: Float[Tensor, "*b d"]
) -> Float[Tensor, "*b d"]:
    """The value of `quantized` with the gradient of `tokens`."""
    return tokens + (quantized - tokens).detach()


@dataclass(frozen=True)
class CodeUsage:
    """How much of a codebook is in use; both figures sink when it collapses."""

    usage: float  # share of the rows that occur, 0 to 1
    perplexity: float  # exp of the entropy of the row frequencies, 1 to the number of rows


def code_usage(codes: Int[Tensor, "b n c"], size: int) -> CodeUsage:
    """Usage and perplexity, averaged over the codes of a token; raises InputError out of range."""
    check_codes(codes, size)
    counts = torch.stack([torch.bincount(c.flatten(), minlength=size) for c in codes.unbind(-1)])
    shares = counts.double() / counts.sum(dim=-1, keepdim=True).clamp(min=1)
    entropy = -(shares * shares.clamp(min=1e-12).log()).sum(dim=-1)
    return CodeUsage(
        usage=(counts > 0).double().mean().item(), perplexity=entropy.exp().mean().item()
    )


def distinct_codes_per_slot(codes: Int[Tensor, "b g c"]) -> Int[Tensor, "g c"]:
    """Different codes that each slot shows over a batch; 1 means that the slot says nothing."""
    ordered = codes.sort(dim=0).values
    return (ordered[1:] != ordered[:-1]).sum(dim=0) + min(len(codes), 1)


def check_codes(codes: Tensor, size: int) -> None:
    """Raise InputError unless every code lies in [0, size)."""
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= size):
        raise InputError(
            f"codes must lie in 0 to {size - 1}, got {int(codes.min())} to {int(codes.max())}: "
            "they come from another codebook"
        )


@dataclass(frozen=True)
class Quantized:
    """A token field after its codebook."""

    codes: Int[Tensor, "b n c"]
    embeds: Float[Tensor, "b n d"]  # straight-through: gradients go to the tokens
    loss: Float[Tensor, ""]  # commitment, plus the rows' own term when gradients train them


class Codebook(nn.Module):
    """A learned codebook: `chunks` independent tables, each for its share of the channels.

    `metric` is how the nearest row is found; `cosine` compares and returns unit vectors. Rows
    follow an exponential moving average (`update`); `decay=0` leaves them to the optimizer.
    """

    def __init__(
        self, *, size: int, dim: int, chunks: int = 1, metric: str = "l2", decay: float = 0.99
    ):
        super().__init__()
        if metric not in METRICS:
            raise InputError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
        if dim % chunks:
            raise InputError(f"{dim} channels cannot be cut into {chunks} equal chunks")
        if not 0.0 <= decay < 1.0:
            raise InputError(f"decay must lie in [0, 1), got {decay}")
        self.size, self.dim, self.chunks = size, dim, chunks
        self.metric, self.decay = metric, decay
        rows = torch.randn(chunks, size, dim // chunks)
        self.rows = nn.Parameter(rows, requires_grad=decay == 0)
        self.counts: Tensor  # moving average of the uses of each row
        self.sums: Tensor  # moving average of the tokens assigned to each row
        self.register_buffer("counts", torch.ones(chunks, size))
        self.register_buffer("sums", self._table().detach().clone())

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Quantized:
        """Quantise with the straight-through gradient and the loss that keeps tokens near rows."""
        codes, embeds = self.quantize(tokens)
        chunks = self._chunks(tokens).flatten(-2)
        loss = F.mse_loss(chunks, embeds.detach())
        if self.decay == 0:
            loss = loss + F.mse_loss(embeds, chunks.detach())
        return Quantized(codes, straight_through(tokens, embeds), loss)

    def quantize(
        self, tokens: Float[Tensor, "b n d"]
    ) -> tuple[Int[Tensor, "b n c"], Float[Tensor, "b n d"]]:
        """Nearest row per chunk: (codes, rows), without the straight-through gradient."""
        table, chunks = self._table(), self._chunks(tokens)
        score = torch.einsum("bncd,cvd->bncv", chunks, table)
        if self.metric == "l2":
            score = score - table.square().sum(dim=-1) / 2  # same order as minus the distance
        codes = score.argmax(dim=-1)
        return codes, self._lookup(codes)

    def embed(self, codes: Int[Tensor, "b n c"]) -> Float[Tensor, "b n d"]:
        """Codes to their rows (eq. 6); raises InputError for codes out of range."""
        check_codes(codes, self.size)
        return self._lookup(codes)

    @torch.no_grad()
    def initialize(
        self, tokens: Float[Tensor, "b n d"], generator: torch.Generator, rounds: int = 10
    ) -> None:
        """Set the rows by k-means on a batch: random tokens first, then `rounds` refinements."""
        chunks = self._chunks(tokens).flatten(0, 1)  # [tokens, chunks, width]
        self.rows.copy_(self._random_rows(chunks, generator))
        for _ in range(rounds):
            codes, _ = self.quantize(tokens)
            counts, sums = self._assigned(codes, chunks)
            means = sums / counts.clamp(min=1)[..., None]
            self.rows.copy_(torch.where(counts[..., None] > 0, means, self.rows))
        self.counts.fill_(1.0)
        self.sums.copy_(self._table())

    @torch.no_grad()
    def update(
        self,
        tokens: Float[Tensor, "b n d"],
        codes: Int[Tensor, "b n c"],
        generator: torch.Generator,
    ) -> int:
        """Move the rows towards their tokens and revive dead ones; returns how many were revived.

        A dead row becomes a random token of the batch, so equal generators give equal codebooks.
        Processes that train together share their counts.
        """
        if self.decay == 0:
            raise InputError("decay=0 leaves the rows to the optimizer: do not call update")
        chunks = self._chunks(tokens).flatten(0, 1)
        counts, sums = self._assigned(codes, chunks)
        fresh = self._random_rows(chunks, generator)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
            torch.distributed.all_reduce(sums)
            torch.distributed.broadcast(fresh, src=0)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        means = self.sums / self.counts.clamp(min=1e-6)[..., None]
        average = self.counts.mean(dim=-1, keepdim=True)
        dead = self.counts < RARE * average
        self.rows.copy_(torch.where(dead[..., None], fresh, means))
        self.counts.copy_(torch.where(dead, average, self.counts))
        self.sums.copy_(torch.where(dead[..., None], fresh * average[..., None], self.sums))
        return int(dead.sum())

    def _table(self) -> Float[Tensor, "c v e"]:
        return F.normalize(self.rows, dim=-1) if self.metric == "cosine" else self.rows

    def _chunks(self, tokens: Tensor) -> Float[Tensor, "b n c e"]:
        if tokens.shape[-1] != self.dim:
            raise InputError(f"this codebook holds {self.dim} channels, got {tokens.shape[-1]}")
        chunks = tokens.unflatten(-1, (self.chunks, -1))
        return F.normalize(chunks, dim=-1) if self.metric == "cosine" else chunks

    def _lookup(self, codes: Tensor) -> Float[Tensor, "b n d"]:
        chunk = torch.arange(self.chunks, device=codes.device)
        return self._table()[chunk, codes].flatten(-2)

    def _assigned(self, codes: Tensor, chunks: Tensor) -> tuple[Tensor, Tensor]:
        """Uses of each row [c v] and sum of the tokens assigned to it [c v e]."""
        chosen = F.one_hot(codes.flatten(0, 1), self.size).to(chunks)  # [tokens, c, v]
        return chosen.sum(dim=0), torch.einsum("ncv,nce->cve", chosen, chunks)

    def _random_rows(self, chunks: Tensor, generator: torch.Generator) -> Float[Tensor, "c v e"]:
        """One random token per row; without repeats while the batch is large enough."""
        count = chunks.shape[0]
        picks = []
        for _ in range(self.chunks):
            order = [
                torch.randperm(count, generator=generator) for _ in range(-(-self.size // count))
            ]
            picks.append(torch.cat(order)[: self.size])
        index = torch.stack(picks).to(chunks.device)  # [c, v]
        return chunks[index, torch.arange(self.chunks, device=chunks.device)[:, None]]
