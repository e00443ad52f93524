"""Any continuous autoencoder as a tokenizer, made discrete by fitted codebooks.

An autoencoder of diffusers (or of the TAESD family, without diffusers) gives a latent field, whose
patches are the tokens. `unicompress fit-codebook` turns their coordinates so that equal chunks
matter equally, and gives every chunk its own codebook (`product_code.py`). X is in these
coordinates, so that the pooling of the plug-in and the distances of its losses see the same space.

Latents need no scaling factor: the fitted coordinates replace it.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from unicompress.errors import CheckpointError, InputError, first_line
from unicompress.registry import require
from unicompress.tokenizers.base import HostFacts, ImageTokenizer, tokenizers
from unicompress.tokenizers.fields import check_dense, seeded, square_grid
from unicompress.tokenizers.product_code import Basis, Books, encode, look_up
from unicompress.tokenizers.tiny_autoencoder import (
    TinyAutoencoder,
    find_pair,
    load_tiny_autoencoder,
)
from unicompress.tokenizers.vq_parts import check_multiple
from unicompress.tokenizers.weight_files import CONFIG, download
from unicompress.tokens import TokenSpec

NATIVE = "TinyAutoencoder"
PROBE = 64  # pixels per side of the picture that shows an autoencoder's shapes
SUBFOLDER = "vae"  # of a pipeline's repository


@tokenizers.register("continuous")
class Continuous(ImageTokenizer):
    """An autoencoder with D codebooks of K rows behind it; unfitted, its codes mean nothing.

    `autoencoder` names the class, in diffusers or `TinyAutoencoder`, and `config` its options.
    Patches of `patch` x `patch` latent places are one token each.
    """

    facts: ClassVar[HostFacts] = HostFacts(
        licence="that of the weights",
        limits="codes come from a fitted codebook (fit-codebook)",
    )

    def __init__(
        self,
        *,
        autoencoder: str = NATIVE,
        config: Mapping[str, Any] | None = None,
        image_size: int = 256,
        patch: int = 2,
        codes_per_token: int = 8,
        codebook_size: int = 1024,
    ):
        super().__init__()
        self.autoencoder, self.config = autoencoder, _plain(config or {})
        self.image_size, self.patch = image_size, patch
        self.codes_per_token, self.codebook_size = codes_per_token, codebook_size
        for name in ("image_size", "patch", "codes_per_token"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if codebook_size < 2:
            raise InputError(f"codebook_size must be at least 2, got {codebook_size}")
        self.network = _build(autoencoder, self.config)
        channels, self.factor = _shapes(self.network, autoencoder)
        grid = square_grid(image_size, self.factor * patch)
        dim = channels * patch**2
        if dim % codes_per_token:
            raise InputError(
                f"{dim} channels per token cannot be cut into {codes_per_token} equal chunks: "
                f"choose codes_per_token among {', '.join(map(str, _divisors(dim)))}"
            )
        self.spec = TokenSpec(
            grid=grid,
            dim=dim,
            code_dim=dim,
            codes_per_token=codes_per_token,
            codebook_size=codebook_size,
            image_size=image_size,
        )
        self.mean: Tensor
        self.into: Tensor
        self.out: Tensor
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("into", torch.eye(dim))
        self.register_buffer("out", torch.eye(dim))
        width = dim // codes_per_token
        self.rows = nn.Parameter(torch.randn(codes_per_token, codebook_size, width))

    def encode(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b t d"]:
        return (self.patches(pixels) - self.mean) @ self.into

    def quantize(
        self, tokens: Float[Tensor, "b n d"]
    ) -> tuple[Int[Tensor, "b n c"], Float[Tensor, "b n e"]]:
        codes = encode(tokens.flatten(0, 1), self.rows).unflatten(0, tokens.shape[:2])
        return codes, self.embed(codes)

    def embed(self, codes: Int[Tensor, "b n c"]) -> Float[Tensor, "b n e"]:
        return look_up(self.rows, codes)

    def pixels(self, dense: Float[Tensor, "b t e"]) -> Float[Tensor, "b 3 h w"]:
        check_dense(dense, self.spec.grid)
        return self.pixels_of_patches(dense @ self.out + self.mean).clamp(-1, 1)

    def patches(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b t d"]:
        """Patches of the latent field as the autoencoder makes it; of a posterior the mode."""
        check_multiple(pixels, self.factor * self.patch)
        return rearrange(
            _encoded(self.network, pixels),
            "b c (rows p) (columns q) -> b (rows columns) (c p q)",
            p=self.patch,
            q=self.patch,
        )

    def pixels_of_patches(self, patches: Float[Tensor, "b t d"]) -> Float[Tensor, "b 3 h w"]:
        """The inverse of `patches` through the decoder, not cut off at black and white."""
        latents = rearrange(
            patches,
            "b (rows columns) (c p q) -> b c (rows p) (columns q)",
            rows=self.spec.grid.rows,
            p=self.patch,
            q=self.patch,
        )
        return _decoded(self.network, latents)

    @torch.no_grad()
    def set_codebooks(self, basis: Basis, books: Books) -> None:
        """Take over fitted coordinates and codebooks; InputError where they do not fit."""
        if basis.into.shape != self.into.shape or books.rows.shape != self.rows.shape:
            raise InputError(
                f"codebooks of shape {tuple(books.rows.shape)} do not fit this tokenizer, which "
                f"needs {tuple(self.rows.shape)}"
            )
        self.mean.copy_(basis.mean)
        self.into.copy_(basis.into)
        self.out.copy_(basis.out)
        self.rows.copy_(books.rows)

    @classmethod
    def tiny(cls) -> "Continuous":
        with seeded():
            return cls(
                config={"latent_channels": 4, "width": 8},
                image_size=64,
                codes_per_token=4,
                codebook_size=32,
            )


def from_autoencoder(
    source: Path | str,
    *,
    image_size: int = 256,
    patch: int = 2,
    codes_per_token: int = 8,
    codebook_size: int = 1024,
    revision: str | None = None,
) -> Continuous:
    """A tokenizer, not yet fitted, around the autoencoder in a folder or hub repository.

    A folder with one encoder and one decoder file of the TAESD family, a model folder of diffusers,
    or a pipeline that holds one in `vae/`. Raises CheckpointError where there is none or it is
    damaged, MissingDependencyError without diffusers where it is needed, InputError for options
    that do not fit.
    """
    shape = {
        "image_size": image_size,
        "patch": patch,
        "codes_per_token": codes_per_token,
        "codebook_size": codebook_size,
    }
    pair = find_pair(Path(source))
    if pair is not None:
        network, options = load_tiny_autoencoder(*pair)
        tokenizer = Continuous(autoencoder=NATIVE, config=options, **shape)
        tokenizer.network.load_state_dict(network.state_dict())
        return tokenizer
    model = _pretrained(source, revision)
    # Private keys say where the weights came from, and are no options.
    options = {k: v for k, v in dict(model.config).items() if not k.startswith("_")}
    tokenizer = Continuous(autoencoder=type(model).__name__, config=options, **shape)
    tokenizer.network.load_state_dict(model.state_dict())
    return tokenizer


def _build(name: str, config: Mapping[str, Any]) -> nn.Module:
    """An autoencoder with random weights."""
    if name == NATIVE:
        try:
            return TinyAutoencoder(**config)
        except TypeError as error:
            raise InputError(f"{NATIVE} does not take the options {sorted(config)}") from error
    kind = _class(name)
    with _quiet():
        network: nn.Module = kind.from_config(dict(config))
    return network.float()


def _class(name: str) -> Any:
    """An autoencoder class of diffusers."""
    diffusers = require("diffusers", extra="hosts")
    found = getattr(diffusers, name, None)
    known = isinstance(found, type) and issubclass(found, diffusers.ModelMixin)
    if not known or not (hasattr(found, "encode") and hasattr(found, "decode")):
        raise InputError(
            f"{name!r} is no autoencoder of diffusers {diffusers.__version__}: use AutoencoderKL, "
            "AutoencoderTiny, AutoencoderDC or one like them"
        )
    return found


def _pretrained(source: Path | str, revision: str | None) -> Any:
    """A diffusers autoencoder with its weights, in float32."""
    diffusers = require("diffusers", extra="hosts")
    subfolder = _subfolder(source, revision)
    place = {"subfolder": subfolder, "revision": revision}
    try:
        name = diffusers.AutoencoderKL.load_config(source, **place).get("_class_name")
        with _quiet():
            return _class(str(name)).from_pretrained(source, use_safetensors=True, **place).float()
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        raise CheckpointError(
            f"{source} holds no autoencoder that can be loaded ({first_line(error)}): pass a "
            "folder or hub id with config.json and diffusion_pytorch_model.safetensors, or an "
            "encoder and a decoder of the TAESD family"
        ) from error


def _subfolder(source: Path | str, revision: str | None) -> str | None:
    """`vae` where the source is a whole pipeline."""
    folder = Path(source)
    if folder.is_dir():
        return None if (folder / CONFIG).is_file() else SUBFOLDER
    if folder.exists() or str(source).count("/") != 1:
        raise CheckpointError(
            f"{source} is no folder and no hub id (owner/name): pass the folder of an autoencoder"
        )
    return None if download(source, CONFIG, revision=revision) else SUBFOLDER


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' remarks on loading."""
    diffusers = require("diffusers", extra="hosts")
    level = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers.logging.set_verbosity(level)


def _encoded(network: Any, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c y x"]:
    """Latents, whatever the autoencoder wraps them in."""
    found = network.encode(pixels)
    if isinstance(found, Tensor):
        return found
    if hasattr(found, "latent_dist"):
        mode: Tensor = found.latent_dist.mode()
        return mode
    latents: Tensor = found.latents if hasattr(found, "latents") else found.latent
    return latents


def _decoded(network: Any, latents: Float[Tensor, "b c y x"]) -> Float[Tensor, "b 3 h w"]:
    """Pixels, likewise."""
    found = network.decode(latents)
    pixels: Tensor = found if isinstance(found, Tensor) else found.sample
    return pixels


@torch.no_grad()
def _shapes(network: nn.Module, name: str) -> tuple[int, int]:
    """(latent channels, pixels per latent place and side), from a small black picture."""
    network.eval()
    latents = _encoded(network, torch.zeros(1, 3, PROBE, PROBE))
    if latents.ndim != 4 or latents.shape[-1] != latents.shape[-2] or PROBE % latents.shape[-1]:
        raise InputError(
            f"{name} turns a {PROBE}x{PROBE} picture into latents of shape "
            f"{tuple(latents.shape)}: only autoencoders of still pictures can be used"
        )
    return latents.shape[1], PROBE // latents.shape[-1]


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _plain(value: Any) -> Any:
    """Options as a file will give them back, so that a saved tokenizer has the same spec."""
    if isinstance(value, Mapping):
        return {str(key): _plain(value[key]) for key in sorted(value)}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
