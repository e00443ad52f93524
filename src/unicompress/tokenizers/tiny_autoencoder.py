"""The tiny distilled autoencoders of the TAESD family, as a network of ours.

Source of the architecture: github.com/madebyollin/taesd (MIT), `taesd.py`. Covered are the members
that shrink a picture eightfold: TAESD, TAESDXL (4 latent channels), TAESD3, TAEF1 (16), and TAEF2
(32, with a branch of global statistics in the blocks around the latents). The 32-fold TAESANA is
built otherwise; use AutoencoderDC for its latents.
"""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from unicompress.errors import CheckpointError, InputError
from unicompress.tokenizers.weight_files import read_tensors

FACTOR = 8  # pixels per latent place and side
LIMIT = 3.0  # the decoder squeezes its input into this range
GROUPS = 4  # of the normalisation in the statistics branch
SUFFIXES = (".safetensors", ".pth", ".pt")


class Block(nn.Module):
    """Three convolutions around a shortcut; `pooled` adds what the whole picture is like."""

    def __init__(self, width: int, *, pooled: bool = False):
        super().__init__()
        self.conv = nn.Sequential(
            _conv(width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width)
        )
        self.pool: nn.Sequential | None = None
        if pooled:
            self.pool = nn.Sequential(
                nn.Conv2d(width, 4 * width, 1, bias=False),
                nn.GroupNorm(GROUPS, 4 * width),
                nn.ReLU(),
                nn.Conv2d(4 * width, width, 1, bias=False),
            )

    def forward(self, field: Float[Tensor, "b w y x"]) -> Float[Tensor, "b w y x"]:
        """Same shape."""
        if self.pool is not None:
            field = field + self.pool(field)
        return F.relu(self.conv(field) + field)


class Squeeze(nn.Module):
    """Keeps latents within +-3, softly."""

    def forward(self, latents: Float[Tensor, "b c y x"]) -> Float[Tensor, "b c y x"]:
        """Same shape."""
        return torch.tanh(latents / LIMIT) * LIMIT


class TinyAutoencoder(nn.Module):
    """Encoder and decoder under the official key names (`encoder.1.conv.0.weight`, ...)."""

    def __init__(self, *, latent_channels: int = 32, width: int = 64, pooled: bool = True):
        super().__init__()
        if latent_channels < 1 or width < 1:
            raise InputError(
                f"latent_channels and width must be positive, got {latent_channels} and {width}"
            )
        parts: list[nn.Module] = [_conv(3, width), Block(width)]
        for level in range(3):
            blocks = [Block(width, pooled=pooled and level == 2) for _ in range(3)]
            parts += [_conv(width, width, stride=2, bias=False), *blocks]
        self.encoder = nn.Sequential(*parts, _conv(width, latent_channels))
        parts = [Squeeze(), _conv(latent_channels, width), nn.ReLU()]
        for level in range(3):
            blocks = [Block(width, pooled=pooled and level == 0) for _ in range(3)]
            parts += [*blocks, nn.Upsample(scale_factor=2), _conv(width, width, bias=False)]
        self.decoder = nn.Sequential(*parts, Block(width), _conv(width, 3))

    def encode(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c y x"]:
        """Pixels in [-1, 1] to latents at an eighth of the size."""
        latents: Tensor = self.encoder(_channels_last((pixels + 1) / 2))
        return latents

    def decode(self, latents: Float[Tensor, "b c y x"]) -> Float[Tensor, "b 3 h w"]:
        """Latents to pixels about [-1, 1], not cut off."""
        pixels: Tensor = self.decoder(_channels_last(latents))
        return 2 * pixels - 1


def find_pair(folder: Path) -> tuple[Path, Path] | None:
    """The two files `*encoder*` and `*decoder*` of a folder; None where there are none.

    Raises CheckpointError where one is missing or several qualify.
    """
    files = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES) if folder.is_dir() else []
    halves = {half: [p for p in files if half in p.name] for half in ("encoder", "decoder")}
    if not any(halves.values()):
        return None
    for half, found in halves.items():
        if len(found) != 1:
            raise CheckpointError(
                f"{folder} holds {len(found)} files named *{half}*, needed one: put one encoder "
                "and one decoder of the TAESD family there"
            )
    return halves["encoder"][0], halves["decoder"][0]


def load_tiny_autoencoder(
    encoder: Path, decoder: Path
) -> tuple[TinyAutoencoder, dict[str, object]]:
    """The network and its options, which follow from the shapes, from two official files.

    float16 weights become float32. Raises CheckpointError, in one line, for files of another model.
    """
    tensors = {
        f"{half}.{name}": tensor.float()
        for half, path in (("encoder", encoder), ("decoder", decoder))
        for name, tensor in read_tensors(path).items()
    }
    first, last = tensors.get("encoder.0.weight"), tensors.get("decoder.1.weight")
    if first is None or last is None or first.ndim != 4 or last.ndim != 4:
        raise CheckpointError(f"{encoder} and {decoder} are no pair of the TAESD family")
    options: dict[str, object] = {
        "latent_channels": last.shape[1],
        "width": first.shape[0],
        "pooled": any(".pool." in name for name in tensors),
    }
    model = TinyAutoencoder(
        latent_channels=last.shape[1], width=first.shape[0], pooled=bool(options["pooled"])
    )
    wanted = model.state_dict()
    odd = sorted(wanted.keys() ^ tensors.keys())
    odd += [
        name for name in wanted.keys() & tensors.keys() if wanted[name].shape != tensors[name].shape
    ]
    if odd:
        raise CheckpointError(
            f"{encoder} and {decoder} do not fit an eightfold autoencoder of the TAESD family: "
            f"{len(odd)} weights differ, first {odd[0]}"
        )
    model.load_state_dict(tensors)
    return model, options


def _conv(inputs: int, outputs: int, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=bias)


def _channels_last(field: Float[Tensor, "b c y x"]) -> Float[Tensor, "b c y x"]:
    """The same values in the memory layout in which CPUs convolve a third faster."""
    return field.contiguous(memory_format=torch.channels_last)
