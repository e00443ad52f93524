"""A host tokenizer with the UniCompress plug-in around it: eq. 1-8 joined, trained, saved."""

import json
import tempfile
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from unicompress.checkpoint import (
    fingerprint,
    load_into,
    load_safetensors,
    save_safetensors,
    write_json,
)
from unicompress.codec_loss import CodecLoss, DenseTarget, codec_loss
from unicompress.codec_spec import PRESETS, CodecSpec
from unicompress.codec_stages import CodecStages
from unicompress.errors import CheckpointError, HostMismatchError, InputError
from unicompress.hub import fetch_folder, upload_folder
from unicompress.requantize import exact, quiet
from unicompress.tokenizers.base import ImageTokenizer

__all__ = ["PRESETS", "CodecLoss", "CodecSpec", "ImageCodec"]

FORMAT = "unicompress-codec-1"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"  # for people and the hub; what is loaded stands in the weights file


class ImageCodec(CodecStages):
    """Compresses a host's dense tokens to a few global and local codes, and expands them again.

    The host is held beside the plug-in, not inside it: it is neither trained, saved, nor switched
    between modes, and is bit-identical after use. At stride 1 without globals nothing is learned
    and everything goes through the host's own quantiser.
    """

    def forward(
        self,
        pixels: Float[Tensor, "b 3 h w"],
        stride: int | None = None,
        global_count: int | None = None,
        generator: torch.Generator | None = None,
    ) -> CodecLoss:
        """The same as `loss`, so that wrappers such as DistributedDataParallel see the call."""
        return self.loss(pixels, stride=stride, global_count=global_count, generator=generator)

    def loss(
        self,
        pixels: Float[Tensor, "b 3 h w"],
        *,
        stride: int | None = None,
        global_count: int | None = None,
        generator: torch.Generator | None = None,
    ) -> CodecLoss:
        """Eq. 8 for one batch at one rate.

        `generator` serves `local_dropout`, `teacher_noise` and `parallel_steps`; InputError where
        one of them needs it.
        """
        with quiet(self.tokenizer):
            with torch.no_grad(), exact(pixels.device):
                dense = self.tokenizer.encode(pixels)
            return self._loss(dense, pixels, (stride, global_count), generator, shift=0)

    @torch.no_grad()
    def shuffled_global_gap(
        self,
        pixels: Float[Tensor, "b 3 h w"],
        *,
        stride: int | None = None,
        global_count: int | None = None,
    ) -> float:
        """How much L_reg + lambda_cb L_cb grows when each image gets the globals of another.

        Near zero means that the decompressor ignores the globals. Needs at least two images.
        """
        if pixels.shape[0] < 2:
            raise InputError("shuffling globals across images needs at least two images")
        training = self.training
        self.eval()
        try:
            with quiet(self.tokenizer):
                dense = self.tokenizer.encode(pixels)
                own, others = (
                    self._loss(
                        dense,
                        pixels,
                        (stride, global_count),
                        torch.Generator().manual_seed(0),  # hides the same tokens both times
                        shift=shift,
                    )
                    for shift in (0, 1)
                )
        finally:
            self.train(training)
        regression, codebook = self.spec.weights
        gap = regression * (others.regression - own.regression)
        return float(gap + codebook * (others.codebook - own.codebook))

    def calibrate(self, pixels: Float[Tensor, "b 3 h w"], generator: torch.Generator) -> None:
        """Set the plug-in's starting point from a batch; once, before training, 64 images or more.

        Without it the global tokens start out nearly equal for all images and stay so.
        """
        grid = self.grid_of(pixels)
        with torch.no_grad(), quiet(self.tokenizer):
            dense = self.tokenizer.encode(pixels)
            if self.global_tokens is not None:
                self.global_tokens.calibrate(dense, grid)
            self._calibrate_decompressor(dense)
            tokens = self.compress(dense, grid=grid)
            streams = {"global": tokens.global_tokens, "local": tokens.local_tokens}
            for stream, field in streams.items():
                self.requantizer.initialize(field, stream, generator)

    def calibrate_decompressor(self, pixels: Float[Tensor, "b 3 h w"]) -> None:
        """The part of `calibrate` that a new decompressor for old codes needs."""
        with torch.no_grad(), quiet(self.tokenizer):
            self._calibrate_decompressor(self.tokenizer.encode(pixels))

    def _calibrate_decompressor(self, dense: Float[Tensor, "b t d"]) -> None:
        if self.decompressor is not None:
            self.decompressor.calibrate(self.requantizer.code_space(dense))

    def update_codebooks(self, loss: CodecLoss, generator: torch.Generator) -> int:
        """Move separate codebooks towards the tokens of a step; call after the optimiser's step.

        Returns how many unused rows were revived.
        """
        return self.requantizer.update(loss.streams, generator)

    def _loss(
        self,
        dense: Float[Tensor, "b t d"],
        pixels: Float[Tensor, "b 3 h w"],
        rate: tuple[int | None, int | None],
        generator: torch.Generator | None,
        shift: int,  # how far globals are moved along the batch
    ) -> CodecLoss:
        stride, count = self._rate(*rate)
        if self.decompressor is None or (stride == 1 and count == 0):
            raise InputError("stride 1 without global tokens is the identity: nothing to train")
        grid = self.grid_of(pixels)
        tokens = self.compress(dense, stride=stride, global_count=count, grid=grid)
        with torch.no_grad(), exact(dense.device):
            target = DenseTarget(
                self.requantizer.code_space(dense), *self.tokenizer.quantize(dense)
            )
        streams = {
            "global": self.requantizer(tokens.global_tokens, "global", plain=False),
            "local": self.requantizer(tokens.local_tokens, "local", plain=False),
        }
        visible = None
        if self.decompressor.parallel_steps > 1:
            draw = _needed(generator, "parallel_steps")
            visible = self.decompressor.draw_visible(dense.shape[0], grid.length, draw)
        prediction = self.decompressor(
            streams["global"].rows.roll(shift, dims=0),
            self._hide(streams["local"].rows, generator),
            grid,
            stride,
            self._teacher(target, generator),
            visible,
        )
        return codec_loss(
            self.spec,
            self.tokenizer,
            prediction,
            target,
            code_rows=self.code_rows,
            pixels=pixels,
            streams=streams,
            codebook_sizes=dict(zip(streams, self.codebook_sizes, strict=True)),
            visible=visible,
        )

    def _teacher(
        self, target: DenseTarget, generator: torch.Generator | None
    ) -> Float[Tensor, "b t e"]:
        """What the decompressor is fed in training: embedded codes, or tokens with noise."""
        if self.spec.head == "codes":
            return target.rows
        if not self.training or self.spec.teacher_noise == 0:
            return target.dense
        draw = _needed(generator, "teacher_noise")
        noise = torch.randn(target.dense.shape, generator=draw).to(target.dense)
        return target.dense + self.spec.teacher_noise * target.dense.std() * noise

    def _hide(
        self, rows: Float[Tensor, "b m e"], generator: torch.Generator | None
    ) -> Float[Tensor, "b m e"]:
        """Zero a share of the local tokens, in training, so that only globals tell of them."""
        if not self.training or self.spec.local_dropout == 0:
            return rows
        draw = _needed(generator, "local_dropout")
        kept = torch.rand(*rows.shape[:2], 1, generator=draw) >= self.spec.local_dropout
        return rows * kept.to(rows)

    # On disk and on the hub

    def save_pretrained(self, folder: Path | str, *, dtype: torch.dtype | None = None) -> None:
        """Write the plug-in's own weights, its options, and which host they belong to.

        `dtype=torch.bfloat16` halves the bytes.
        """
        host = self.tokenizer
        notes = {
            "format": FORMAT,
            "spec": json.dumps(self.spec.to_dict(), sort_keys=True),
            "host": str(host),
            "host_fingerprint": fingerprint(host),
        }
        weights = {
            name: tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
            for name, tensor in self.state_dict().items()
        }
        save_safetensors(weights, Path(folder) / WEIGHTS, notes)
        write_json({**notes, "spec": self.spec.to_dict()}, Path(folder) / CONFIG)

    @classmethod
    def from_pretrained(
        cls, source: Path | str, tokenizer: ImageTokenizer, *, revision: str | None = None
    ) -> "ImageCodec":
        """Load from a folder or a hub id around the host it was trained with.

        Raises HostMismatchError for another host, CheckpointError for damaged or foreign files.
        """
        path = fetch_folder(source, [WEIGHTS, CONFIG], revision=revision) / WEIGHTS
        tensors, notes = load_safetensors(path)
        if notes.get("format") != FORMAT:
            raise CheckpointError(f"{path} holds no {FORMAT} plug-in, but {notes.get('format')!r}")
        found = fingerprint(tokenizer)
        if notes["host_fingerprint"] != found:
            raise HostMismatchError(
                f"{path} was trained around the tokenizer {notes['host']} with fingerprint "
                f"{notes['host_fingerprint'][:12]}, got {tokenizer} with {found[:12]}: "
                "load that tokenizer, or train a plug-in for this one"
            )
        codec = cls(tokenizer, CodecSpec.from_dict(json.loads(notes["spec"])))
        load_into(codec, tensors, path)
        return codec.eval()

    def push_to_hub(
        self, hub_id: str, *, private: bool | None = None, revision: str | None = None
    ) -> str:
        """Upload what `save_pretrained` writes to a model repository; returns its address."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return upload_folder(folder, hub_id, private=private, revision=revision)


def _needed(generator: torch.Generator | None, option: str) -> torch.Generator:
    if generator is None:
        raise InputError(
            f"{option} draws at random in training: pass a torch.Generator to the loss"
        )
    return generator
