"""What a codec computes, equation by equation: compress, quantise, look up, decompress."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from unicompress.codec_spec import PRESETS, CodecSpec
from unicompress.compressors import compressors
from unicompress.decompressors import Decompressed, Decompressor, code_rows
from unicompress.errors import InputError
from unicompress.global_tokens import GlobalTokens, global_tokens
from unicompress.requantize import Requantizer, quiet
from unicompress.tokenizers.base import ImageTokenizer
from unicompress.tokens import CompressedTokens, Grid


class CodecStages(nn.Module):
    """The plug-in around a host, without its training and files (`ImageCodec` adds them)."""

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
        self.global_tokens: GlobalTokens | None = None
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

    def _apply(self, fn: Any, recurse: bool = True) -> "CodecStages":
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
