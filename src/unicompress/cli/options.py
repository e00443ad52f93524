"""What the commands share: options of one meaning, and how their values become objects."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unicompress.errors import InputError, first_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from unicompress.codec import ImageCodec
    from unicompress.unified import UnifiedModel

# The panels of --help, in the order in which a newcomer needs them.
PANELS = START, USE, FILES, TRAIN, MEASURE, LOOK = (
    "Start here",
    "Use a model",
    "Files in and out",
    "Train",
    "Measure",
    "Look inside",
)

Json = Annotated[
    Path | None, typer.Option("--json", metavar="PATH", help="Also write the result as JSON.")
]
Device = Annotated[
    str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")
]
ProcessorTime = Annotated[
    bool, typer.Option("--processor-time", help="Seconds of the processor: for a busy machine.")
]
MODEL_HELP = "Folder or hub id; compressed and dense are the two models that ship."
Model = Annotated[str, typer.Option(metavar="MODEL", help=MODEL_HELP)]
Dense = Annotated[str, typer.Option(metavar="MODEL", help="The dense model.")]
Compressed = Annotated[str, typer.Option(metavar="MODEL", help="The compressed model.")]


def device_named(name: str) -> "torch.device":
    """`auto`, or what torch understands and this machine has."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = first_line(error)
        raise InputError(f"the device {name!r} cannot be used ({reason}): try cpu") from error
    return device


def timing(processor_time: bool, device: str) -> AbstractContextManager[None]:
    """A block that is timed by the processor's clock instead of that on the wall, if wanted."""
    from unicompress import generate

    if not processor_time:
        return nullcontext()
    if device_named(device).type != "cpu":
        raise InputError("--processor-time sees nothing of a GPU's work: use it with --device cpu")
    return generate.processor_time()


def check_png(path: Path | None) -> None:
    """Refuse another ending before the work rather than after it."""
    if path is not None and path.suffix.lower() != ".png":
        raise InputError(f"{path} must end in .png: that is the format written")


def load_model(name: str, device: str) -> "UnifiedModel":
    """A model that ships, by name, unless a folder has that name; otherwise a folder or hub id."""
    from unicompress import reference

    return reference.load_any(name, device=device_named(device))


def codec_of(model: "UnifiedModel") -> "ImageCodec":
    """The model's codec; for a dense model the identity, which keeps the host's own codes."""
    from unicompress.codec import CodecSpec, ImageCodec

    if model.codec is not None:
        return model.codec
    return ImageCodec(model.tokenizer, CodecSpec(stride=1, global_count=0)).eval()


def read_picture(path: Path, model: "UnifiedModel") -> "Tensor":
    """An image file, cropped and resized for the model: [3, h, w] in [-1, 1]."""
    from unicompress.data.images import load_image, to_tensor

    return to_tensor(load_image(path, model.tokenizer.spec.image_size)).to(model.device)


def fast_type(device: "torch.device") -> "torch.dtype":
    """Of large random language models: bf16 where the hardware multiplies it fast."""
    import torch

    from unicompress.training.progress import bf16_is_fast

    return torch.bfloat16 if bf16_is_fast(device) else torch.float32


def about(name: str, model: "UnifiedModel") -> dict[str, Any]:
    return {
        "model": name,
        "tokens_per_image": model.tokens_per_image,
        "interface_tokens": model.interface_tokens,
    }
