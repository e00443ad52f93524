"""The objective that trains a small VQ host from scratch.

Three measured lessons are built in. Without centring before the l2 norm, the codebook dies (72 of
512 codes used): z is batch-normalised in the first part of the training, then the statistics are
frozen and folded into `quant_conv`. The codebook starts by k-means once the features have settled,
follows them by exponential averages, and dead rows are re-seeded. A late-interaction contrastive
loss between caption phrases and tokens (as the sigmoid and softmax losses of VILA-U and UniTok, but
per phrase and token) makes attributes readable off single tokens of X.
"""

import zlib
from collections.abc import Sequence
from itertools import chain

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from unicompress.tokenizers.janus_vq import JanusVQ

HASH_ROWS = 4096  # words of the captions are hashed to this many embedding rows


class PhraseContrast(nn.Module):
    """InfoNCE between caption phrases and the images with them, through their best tokens."""

    def __init__(self, *, dim: int, width: int = 64):
        super().__init__()
        self.words = nn.EmbeddingBag(HASH_ROWS, width, mode="mean")
        self.text = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.image = nn.Linear(dim, width)
        self.log_scale = nn.Parameter(torch.tensor(2.3))

    def forward(
        self, dense: Float[Tensor, "b t d"], phrases: Sequence[Sequence[str]]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """(loss, share of phrases whose best image has them); `phrases`: one list per image."""
        flat = sorted(set(chain.from_iterable(phrases)))
        holds = torch.tensor([[phrase in own for own in phrases] for phrase in flat])  # [phrase, b]
        words = [
            [zlib.crc32(word.encode()) % HASH_ROWS for word in phrase.split()] for phrase in flat
        ]
        offsets = torch.tensor([0, *[len(w) for w in words[:-1]]]).cumsum(0)
        text = self.text(self.words(torch.tensor(list(chain.from_iterable(words))), offsets))
        text = F.normalize(text, dim=-1)
        image = F.normalize(self.image(dense), dim=-1)
        similarity = torch.einsum("pe,bte->pbt", text, image) * self.log_scale.exp().clamp(max=50)
        score = similarity.logsumexp(-1)  # [phrase, b]: any token may carry the phrase
        log_share = score.log_softmax(-1).masked_fill(~holds, float("-inf"))
        hit = holds.gather(1, score.argmax(-1, keepdim=True)).float().mean()
        return -log_share.logsumexp(-1).mean(), hit


class TokenizerObjective(nn.Module):
    """Reconstruction, commitment, phrase contrast for a `JanusVQ`; call `finish()` at the end.

    Args:
        quantize_from: share of the training after which the codebook is initialised and used.
        freeze_centre: share of the training after which the centring statistics stop moving.
        commitment: weight of the squared distance (summed over channels) of z to its code.
        contrast: weight of the phrase contrast; 0 leaves it out.
    """

    cluster_size: Tensor
    cluster_sum: Tensor
    ready: Tensor
    steps: Tensor

    def __init__(
        self,
        tokenizer: JanusVQ,
        *,
        quantize_from: float = 0.15,
        freeze_centre: float = 0.6,
        commitment: float = 0.02,
        contrast: float = 0.05,
        decay: float = 0.99,
        seed: int = 0,
    ):
        super().__init__()
        self.tokenizer = tokenizer
        self.quantize_from = quantize_from
        self.freeze_centre = freeze_centre
        self.commitment = commitment
        self.contrast_weight = contrast
        self.decay = decay
        self.seed = seed
        spec = tokenizer.spec
        self.centre = nn.BatchNorm1d(spec.code_dim, affine=False, momentum=0.05)
        self.contrast = PhraseContrast(dim=spec.dim) if contrast > 0 else None
        self.register_buffer("cluster_size", torch.ones(spec.codebook_size))
        self.register_buffer("cluster_sum", torch.zeros(spec.codebook_size, spec.code_dim))
        self.register_buffer("ready", torch.tensor(False))
        self.register_buffer("steps", torch.tensor(0))
        tokenizer.train()
        tokenizer.vq.quantize.requires_grad_(False)  # moved by averages, not by gradients
        for module in tokenizer.modules():  # the default trains far better than N(0, .02)
            if isinstance(module, nn.Conv2d):
                module.reset_parameters()

    def forward(
        self, pixels: Float[Tensor, "b 3 h w"], phrases: Sequence[Sequence[str]], progress: float
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Loss and detached logs for one batch; `progress` in [0, 1] drives the schedule."""
        tokenizer = self.tokenizer
        self.steps += 1
        dense = tokenizer.encode(pixels)
        self.centre.train(self.training and progress < self.freeze_centre)
        z = self.centre(tokenizer.to_code_space(dense).flatten(0, 1)).view(*dense.shape[:2], -1)
        unit = F.normalize(z.float(), dim=-1)
        if progress >= self.quantize_from and not self.ready:
            self._start_codebook(unit.detach().flatten(0, 1))
        logs: dict[str, Tensor] = {}
        code = unit
        commitment = pixels.new_zeros(())
        if self.ready:
            book = tokenizer.codebook()
            with torch.autocast(pixels.device.type, enabled=False):  # neighbours differ by little
                chosen = (unit.detach() @ book.T).argmax(-1)
            code = book[chosen]
            commitment = (unit - code).square().sum(-1).mean()
            if self.training:
                self._follow(unit.detach().flatten(0, 1), chosen.flatten())
            share = self.cluster_size / self.cluster_size.sum()
            logs["perplexity"] = torch.exp(-(share * (share + 1e-9).log()).sum())
            code = unit + (code - unit).detach()
        output = tokenizer.raw_pixels(code).float()
        error = output - pixels
        square = error.square().mean()
        loss = square + error.abs().mean() + self.commitment * commitment
        if self.contrast is not None:
            contrast, hit = self.contrast(dense, phrases)
            loss = loss + self.contrast_weight * contrast
            logs |= {"contrast": contrast, "phrase_hit": hit}
        logs |= {"psnr": 10 * torch.log10(4 / square), "commitment": commitment}
        return loss, {name: value.detach() for name, value in logs.items()}

    @torch.no_grad()
    def _start_codebook(self, unit: Float[Tensor, "n e"]) -> None:
        """Spherical k-means on one batch, started from random rows."""
        generator = torch.Generator().manual_seed(self.seed)
        size = self.cluster_size.numel()
        book = unit[torch.randint(len(unit), (size,), generator=generator)].clone()
        book = F.normalize(book + 0.01 * torch.randn(book.shape, generator=generator), dim=-1)
        with torch.autocast(unit.device.type, enabled=False):
            for _ in range(20):
                member = F.one_hot((unit @ book.T).argmax(-1), size).to(unit)  # [n, v]
                means = F.normalize(member.T @ unit, dim=-1)
                book = torch.where(member.sum(0)[:, None] > 0, means, book)
        self.cluster_size.fill_(len(unit) / size)
        self.cluster_sum.copy_(book * len(unit) / size)
        self.tokenizer.vq.quantize.embedding.weight.copy_(book)
        self.ready.fill_(True)

    @torch.no_grad()
    def _follow(self, unit: Float[Tensor, "n e"], chosen: Tensor) -> None:
        """Exponential averages of the members of each code; rows that nobody uses are re-seeded."""
        size = self.cluster_size.numel()
        count = torch.bincount(chosen, minlength=size).to(unit)
        total = torch.zeros_like(self.cluster_sum).index_add_(0, chosen, unit)
        self.cluster_size.lerp_(count, 1 - self.decay)
        self.cluster_sum.lerp_(total, 1 - self.decay)
        dead = self.cluster_size < 0.02 * len(unit) / size
        if dead.any():
            generator = torch.Generator().manual_seed(self.seed + int(self.steps))
            rows = torch.randint(len(unit), (int(dead.sum()),), generator=generator)
            average = len(unit) / size
            self.cluster_size[dead] = average
            self.cluster_sum[dead] = unit[rows] * average
        self.tokenizer.vq.quantize.embedding.weight.copy_(F.normalize(self.cluster_sum, dim=-1))

    @torch.no_grad()
    def finish(self) -> JanusVQ:
        """Fold the centring into `quant_conv`, so that the host needs nothing of this class."""
        conv = self.tokenizer.vq.quant_conv
        mean, variance = self.centre.running_mean, self.centre.running_var
        assert mean is not None  # BatchNorm tracks both by default
        assert variance is not None
        scale = (variance + self.centre.eps).rsqrt()
        conv.weight.mul_(scale[:, None, None, None])
        conv.bias.sub_(mean).mul_(scale)
        return self.tokenizer.freeze()  # type: ignore[return-value]
