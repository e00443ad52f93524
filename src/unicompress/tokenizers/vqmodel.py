"""Any single-codebook `VQModel` of diffusers: LDM's VQ-f4 and VQ-f8, aMUSEd's, Kandinsky's MoVQ.

diffusers is optional (`pip install 'unicompress[hosts]'`). X is what its `encode` returns, after
`quant_conv`; the quantiser is its own, by Euclidean distance. Where the decoder is conditioned on
the quantised field (`norm_type="spatial"`), it gets the same field twice. `scaling_factor` serves
diffusion models and plays no part here.
"""

import inspect
from typing import Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor, nn

from unicompress.errors import CheckpointError, InputError
from unicompress.registry import require
from unicompress.tokenizers.base import HostFacts, tokenizers
from unicompress.tokenizers.fields import seeded, square_grid, to_field, to_sequence
from unicompress.tokenizers.official import Layout, ReleasedTokenizer, ReleasedWeights
from unicompress.tokenizers.vq_parts import check_multiple
from unicompress.tokens import TokenSpec


@tokenizers.register("vqmodel")
class VQModel(ReleasedTokenizer):
    """Single-codebook host around diffusers' `VQModel(**config)`.

    `config` comes from the `config.json` beside a checkpoint; without one it is diffusers' default.
    Pictures of any sides that fit can be encoded; `decode` takes those of `image_size` pixels.
    """

    facts: ClassVar[HostFacts] = HostFacts(
        licence="that of the weights",
        verified="diffusers' own VQModel",
    )
    layout: ClassVar[Layout] = Layout(
        files=(
            "diffusion_pytorch_model.safetensors",
            "vqvae/diffusion_pytorch_model.safetensors",
            "movq/diffusion_pytorch_model.safetensors",
            "diffusion_pytorch_model.bin",
            "vqvae/diffusion_pytorch_model.bin",
            "movq/diffusion_pytorch_model.bin",
        ),
        prefixes=("vq.",),
        renames=(  # names of attention from before diffusers 0.17
            (r"\.attentions\.(\d+)\.query\.", r".attentions.\1.to_q."),
            (r"\.attentions\.(\d+)\.key\.", r".attentions.\1.to_k."),
            (r"\.attentions\.(\d+)\.value\.", r".attentions.\1.to_v."),
            (r"\.attentions\.(\d+)\.proj_attn\.", r".attentions.\1.to_out.0."),
        ),
    )

    def __init__(self, *, image_size: int = 256, config: dict[str, Any] | None = None):
        super().__init__()
        model = require("diffusers", extra="hosts").VQModel
        self.image_size = image_size
        self.config = dict(config or {})
        known = inspect.signature(model.__init__).parameters
        if unknown := [name for name in self.config if name not in known]:
            raise InputError(
                f"diffusers' VQModel has no option {unknown[0]!r}: update diffusers, or leave it "
                "out of the config"
            )
        self.vq = model(**self.config)
        settings = self.vq.config
        self.patch = 2 ** (len(settings.block_out_channels) - 1)  # pixels per token and side
        book = self.vq.quantize.embedding.weight
        self.spec = TokenSpec(
            grid=square_grid(image_size, self.patch),
            dim=book.shape[1],
            code_dim=book.shape[1],
            codes_per_token=1,
            codebook_size=book.shape[0],
            image_size=image_size,
        )

    @property
    def released_part(self) -> nn.Module:
        return self.vq

    def encode(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b t d"]:
        check_multiple(pixels, self.patch)
        return to_sequence(self.vq.encode(pixels).latents)

    def quantize(
        self, tokens: Float[Tensor, "b n d"]
    ) -> tuple[Int[Tensor, "b n c"], Float[Tensor, "b n e"]]:
        field = tokens.transpose(1, 2)[..., None]  # [b, d, n, 1]
        _, _, (_, _, index) = self.vq.quantize(field)
        codes = index.view(*tokens.shape[:2], 1)
        return codes, self.embed(codes)

    def embed(self, codes: Int[Tensor, "b n c"]) -> Float[Tensor, "b n e"]:
        return self.vq.quantize.embedding(codes[..., 0])

    def pixels(self, dense: Float[Tensor, "b t e"]) -> Float[Tensor, "b 3 h w"]:
        # Not through `decode`, which takes codes instead of a field under `lookup_from_codebook`.
        field = to_field(dense, self.spec.grid)
        condition = field if self.vq.config.norm_type == "spatial" else None
        return self.vq.decoder(self.vq.post_quant_conv(field), condition).clamp(-1, 1)

    @classmethod
    def options_in(cls, weights: ReleasedWeights) -> dict[str, object]:
        kind = weights.config.get("_class_name", "VQModel")
        if kind != "VQModel":
            raise CheckpointError(
                f"{weights.path} is diffusers' {kind}, not a VQModel: a model without a codebook "
                "needs the host `continuous`"
            )
        config = {name: v for name, v in weights.config.items() if not name.startswith("_")}
        return {"config": config} if config else {}

    @classmethod
    def tiny(cls) -> "VQModel":
        config = {
            "down_block_types": ["DownEncoderBlock2D"] * 2,
            "up_block_types": ["UpDecoderBlock2D"] * 2,
            "block_out_channels": [16, 32],
            "latent_channels": 4,
            "num_vq_embeddings": 32,
            "norm_num_groups": 8,
        }
        with seeded():
            return cls(image_size=16, config=config)
