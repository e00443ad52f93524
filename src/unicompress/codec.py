"""A host tokenizer with the UniCompress plug-in around it: eq. 1-8 joined."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from unicompress.checkpoint import (
    fingerprint,
    load_into,
    load_safetensors,
    save_safetensors,
    write_json,
)
from unicompress.codec_loss import CodecLoss, DenseTarget, codec_loss
from unicompress.codec_spec import PRESETS, CodecSpec
from unicompress.compressors import compressors
from unicompress.decompressors import Decompressed, Decompressor, code_rows
from unicompress.errors import CheckpointError, HostMismatchError, InputError
from unicompress.global_tokens import global_tokens
from unicompress.hub import fetch_folder, upload_folder
from unicompress.requantize import Requantizer, quiet
from unicompress.tokenizers.base import ImageTokenizer
from unicompress.tokens import CompressedTokens, Grid

__all__ = ["PRESETS", "CodecLoss", "CodecSpec", "ImageCodec"]

FORMAT = "unicompress-codec-1"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"  # for people and the hub; what is loaded stands in the weights file


class ImageCodec(nn.Module):
    """Compresses a host's dense tokens to a few global and local codes, and expands them again.

    The host is held beside the plug-in, not inside it: it is neither trained, saved, nor switched
    between modes, and is bit-identical after use. At stride 1 without globals nothing is learned
    and everything goes through the host's own quantiser.
    """

    code_rows: Float[Tensor, "c v e"]  # what each code adds to its token's embedding

    def __init__(self, tokenizer: ImageTokenizer, spec: CodecSpec | None = None):
        super().__init__()
        self.spec = spec or PRESETS["default"]
        self._host = (tokenizer,)  # a tuple, so that torch does not register it as a submodule
        host, own = tokenizer.spec, self.spec
        rows = code_rows(
            tokenizer.embed, host.codes_per_token, host.codebook_size, tokenizer.device
        )
        # Each place's rows come with the mean of the other places; taken away, they add up.
        mean = rows.mean(dim=1, keepdim=True)
        self.register_buffer("code_rows", rows - mean + mean / len(rows), persistent=False)
        self.compressors = nn.ModuleDict(
            {str(s): compressors.build(own.compressor, dim=host.dim, stride=s) for s in own.rates}
        )
        self.global_tokens: nn.Module | None = None
        if own.global_count:
            self.global_tokens = global_tokens.build(
                own.global_kind, dim=host.dim, count=own.global_count
            )
        self.requantizer = Requantizer(tokenizer, own)
        self.decompressor: Decompressor | None = None
        if not own.identity:
            self.decompressor = Decompressor(
                code_dim=host.code_dim,
                codes_per_token=host.codes_per_token,
                codebook_size=host.codebook_size,
                order=own.order,
                head=own.head,
                width=own.width,
                depth=own.depth,
                heads=own.heads,
                strides=own.rates,
                parallel_steps=own.parallel_steps,
                max_globals=own.global_count,
                parent=own.parent,
                summary=own.summary,
                residual=own.residual,
                mixing=own.mixing,
                rows=rows if own.residual and own.head == "codes" else None,
            )

    @property
    def tokenizer(self) -> ImageTokenizer:
        """The host."""
        return self._host[0]

    @property
    def codebook_sizes(self) -> tuple[int, int]:
        """Entries per code of the global and of the local stream: K_g and K_x of eq. 4."""
        return self.requantizer.codebook_size("global"), self.requantizer.codebook_size("local")

    def _apply(self, fn: Any, recurse: bool = True) -> "ImageCodec":
        """Moving the codec moves the host along."""
        self.tokenizer._apply(fn, recurse)
        return super()._apply(fn, recurse)

    # Rates

    def tokens_per_image(
        self, stride: int | None = None, global_count: int | None = None, grid: Grid | None = None
    ) -> int:
        """Codes per image: N_g + ceil(H / s) * ceil(W / s)."""
        stride, global_count = self._rate(stride, global_count)
        return global_count + (grid or self.tokenizer.spec.grid).pooled(stride).length

    def interface_tokens(
        self, stride: int | None = None, global_count: int | None = None, grid: Grid | None = None
    ) -> int:
        """Positions that the language model sees per image: codes, BOS, EOS, and SEP (eq. 5).

        Without globals there is nothing to separate, so no SEP.
        """
        delimiters = 3 if self._rate(stride, global_count)[1] else 2
        return self.tokens_per_image(stride, global_count, grid) + delimiters

    def sample_rate(self, generator: torch.Generator) -> tuple[int, int]:
        """A stride and a count of globals for one training step.

        Half of the steps train the main rate, the others one drawn evenly from `spec.rates` and,
        where `spec.nested`, from all prefixes of the globals.
        """
        main, stride_index, count = (
            int(torch.randint(high, (), generator=generator))
            for high in (2, len(self.spec.rates), self.spec.global_count + 1)
        )
        if main:
            return self.spec.stride, self.spec.global_count
        stride = self.spec.rates[stride_index]
        if not self.spec.nested or (stride == 1 and count == 0):
            count = self.spec.global_count
        return stride, count

    def _rate(self, stride: int | None, global_count: int | None) -> tuple[int, int]:
        stride = self.spec.stride if stride is None else stride
        global_count = self.spec.global_count if global_count is None else global_count
        if stride not in self.spec.rates:
            known = ", ".join(map(str, self.spec.rates))
            raise InputError(f"this codec was built for stride {known}, got {stride}")
        if not 0 <= global_count <= self.spec.global_count:
            raise InputError(
                f"this codec has {self.spec.global_count} global tokens, got {global_count}"
            )
        return stride, global_count

    def grid_of(self, pixels: Float[Tensor, "b 3 h w"]) -> Grid:
        """The dense grid of an image of any size that the host takes."""
        spec = self.tokenizer.spec
        patch = spec.image_size // spec.grid.rows
        height, width = pixels.shape[-2:]
        if height % patch or width % patch:
            raise InputError(
                f"an image of {height}x{width} pixels does not fit the tokenizer: height and "
                f"width must be multiples of {patch}"
            )
        return Grid(height // patch, width // patch)

    # Stages, in the order of the paper

    def compress(
        self,
        dense: Float[Tensor, "b t d"],
        *,
        stride: int | None = None,
        global_count: int | None = None,
        grid: Grid | None = None,
    ) -> CompressedTokens:
        """X to G and X^ (eq. 1-3); the first `global_count` globals, the host's grid by default."""
        stride, global_count = self._rate(stride, global_count)
        grid = grid or self.tokenizer.spec.grid
        if dense.shape[1] != grid.length:
            raise InputError(
                f"{dense.shape[1]} dense tokens do not fill a {grid.rows}x{grid.columns} grid: "
                "pass the grid they belong to"
            )
        globals_ = dense.new_zeros(dense.shape[0], 0, dense.shape[2])
        if self.global_tokens is not None and global_count:
            globals_ = self.global_tokens(dense, grid, global_count)
        locals_ = self.compressors[str(stride)](dense, grid)
        return CompressedTokens(globals_, locals_, grid.pooled(stride), grid, stride)

    def quantize(
        self, tokens: CompressedTokens
    ) -> tuple[Int[Tensor, "b n c"], Float[Tensor, "b n e"]]:
        """Both streams to codes and looked-up rows, globals first (eq. 4 and 6)."""
        plain = tokens.stride == 1 and tokens.global_tokens.shape[1] == 0
        with quiet(self.tokenizer):
            parts = [
                self.requantizer(tokens.global_tokens, "global", plain=False),
                self.requantizer(tokens.local_tokens, "local", plain=plain),
            ]
        codes, rows = [part.codes for part in parts], [part.rows for part in parts]
        return torch.cat(codes, dim=1), torch.cat(rows, dim=1)

    def embed(
        self, codes: Int[Tensor, "b n c"], global_count: int | None = None
    ) -> Float[Tensor, "b n e"]:
        """Codes, globals first, to rows of their codebooks (eq. 6)."""
        count = self.spec.global_count if global_count is None else global_count
        with quiet(self.tokenizer):
            return self._rows(codes, count, plain=False)

    def _rows(
        self, codes: Int[Tensor, "b n c"], global_count: int, *, plain: bool
    ) -> Float[Tensor, "b n e"]:
        streams = {"global": codes[:, :global_count], "local": codes[:, global_count:]}
        parts = [
            self.requantizer.embed(c, s, plain=plain) for s, c in streams.items() if c.shape[1]
        ]
        return torch.cat(parts, dim=1)

    @torch.no_grad()
    def expand(
        self,
        tokens: Int[Tensor, "b n c"] | CompressedTokens,
        *,
        stride: int | None = None,
        global_count: int | None = None,
        grid: Grid | None = None,
        generator: torch.Generator | None = None,
        temperature: float = 0.0,
        use_cache: bool = True,
    ) -> Decompressed:
        """Compressed codes to dense tokens and, with the codes head, their codes (eq. 6-7).

        The count of globals follows from the number of codes unless given. Raises InputError for
        codes out of range and for a number of codes that fits no rate.
        """
        if isinstance(tokens, CompressedTokens):
            stride, grid = tokens.stride, tokens.dense_grid
            global_count = tokens.global_tokens.shape[1]
            tokens, _ = self.quantize(tokens)
        grid = grid or self.tokenizer.spec.grid
        stride, global_count = self.check_codes(
            tokens, stride=stride, global_count=global_count, grid=grid
        )
        plain = stride == 1 and global_count == 0
        with quiet(self.tokenizer):
            rows = self._rows(tokens, global_count, plain=plain)
            if plain or self.decompressor is None:
                return Decompressed(dense=rows, codes=tokens, steps=0)
            return self.decompressor.generate(
                rows[:, :global_count],
                rows[:, global_count:],
                grid,
                stride,
                self.tokenizer.embed,
                generator=generator,
                temperature=temperature,
                use_cache=use_cache,
            )

    def decompress(
        self,
        tokens: Int[Tensor, "b n c"] | CompressedTokens,
        *,
        stride: int | None = None,
        global_count: int | None = None,
        grid: Grid | None = None,
        generator: torch.Generator | None = None,
        temperature: float = 0.0,
        use_cache: bool = True,
    ) -> Float[Tensor, "b t e"]:
        """Compressed codes to dense tokens, ready for the host's `decode`; see `expand`."""
        return self.expand(
            tokens,
            stride=stride,
            global_count=global_count,
            grid=grid,
            generator=generator,
            temperature=temperature,
            use_cache=use_cache,
        ).dense

    @torch.no_grad()
    def encode(
        self,
        pixels: Float[Tensor, "b 3 h w"],
        *,
        stride: int | None = None,
        global_count: int | None = None,
    ) -> Int[Tensor, "b n c"]:
        """Pixels in [-1, 1] to compressed codes, globals first."""
        grid = self.grid_of(pixels)
        with quiet(self.tokenizer):
            dense = self.tokenizer.encode(pixels)
        tokens = self.compress(dense, stride=stride, global_count=global_count, grid=grid)
        return self.quantize(tokens)[0]

    @torch.no_grad()
    def decode(
        self,
        codes: Int[Tensor, "b n c"],
        *,
        stride: int | None = None,
        global_count: int | None = None,
        grid: Grid | None = None,
        generator: torch.Generator | None = None,
        temperature: float = 0.0,
    ) -> Float[Tensor, "b 3 h w"]:
        """Compressed codes to pixels in [-1, 1]; the host must take that grid."""
        dense = self.decompress(
            codes,
            stride=stride,
            global_count=global_count,
            grid=grid,
            generator=generator,
            temperature=temperature,
        )
        with quiet(self.tokenizer):
            return self.tokenizer.decode(dense)

    # Training

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
        """Eq. 8 for one batch at one rate; `generator` draws what `spec.local_dropout` hides."""
        with quiet(self.tokenizer):
            with torch.no_grad():
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
            if self.decompressor is not None:
                self.decompressor.calibrate(self.requantizer.code_space(dense))
            tokens = self.compress(dense, grid=grid)
            streams = {"global": tokens.global_tokens, "local": tokens.local_tokens}
            for stream, field in streams.items():
                self.requantizer.initialize(field, stream, generator)

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
        with torch.no_grad():
            target = DenseTarget(
                self.requantizer.code_space(dense), *self.tokenizer.quantize(dense)
            )
        streams = {
            "global": self.requantizer(tokens.global_tokens, "global", plain=False),
            "local": self.requantizer(tokens.local_tokens, "local", plain=False),
        }
        visible = None
        if self.spec.order == "parallel" and self.spec.head == "codes":
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

    def check_codes(
        self,
        codes: Tensor,
        *,
        stride: int | None = None,
        global_count: int | None = None,
        grid: Grid | None = None,
    ) -> tuple[int, int]:
        """Stride and count of globals that codes belong to.

        Raises InputError for a shape that fits no rate and for values out of range.
        """
        grid = grid or self.tokenizer.spec.grid
        per_token = self.tokenizer.spec.codes_per_token
        if codes.ndim != 3 or codes.shape[-1] != per_token or codes.is_floating_point():
            raise InputError(
                f"codes must be whole numbers of shape [images, tokens, {per_token}], got "
                f"{str(codes.dtype).removeprefix('torch.')} of shape {list(codes.shape)}"
            )
        stride = self._rate(stride, 0)[0]
        locals_ = grid.pooled(stride).length
        count = codes.shape[1] - locals_ if global_count is None else global_count
        if not 0 <= count <= self.spec.global_count or codes.shape[1] != count + locals_:
            raise InputError(
                f"{codes.shape[1]} codes per image do not fit stride {stride} on a "
                f"{grid.rows}x{grid.columns} grid: needed are {locals_} local codes and 0 to "
                f"{self.spec.global_count} globals"
            )
        plain = stride == 1 and count == 0
        self.requantizer.check(codes[:, :count], "global", plain=plain)
        self.requantizer.check(codes[:, count:], "local", plain=plain)
        return stride, count

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
