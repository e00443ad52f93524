"""transformers' Janus: a SigLIP-like encoder to understand, a VQ autoencoder to draw."""

from typing import Any

import torch
from torch.nn import functional as F

from unicompress.reducers.base import Signals
from unicompress.reducers.g2tr import anchors_of
from unicompress.reducers.hosts.base import hosts
from unicompress.reducers.hosts.blocks import EncoderBlocks
from unicompress.reducers.hosts.encoder import EncoderProbe
from unicompress.reducers.hosts.placeholders import PlaceholderHost


@hosts.register("janus")
class Janus(PlaceholderHost):
    """One square field per image; anchors from the VQ encoder, which sees the same pixels.

    A VQ model has no posterior: the anchors' latent is the field before quantisation. Its places
    are 16 pixels wide already, so it is averaged 2 x 2 without patches. `anchor_tokens` are its
    codes as the language model writes them (generation embeddings and aligner), averaged 2 x 2.
    """

    kinds = ("JanusForConditionalGeneration",)
    gives = frozenset(
        {
            "attention",
            "shallow_attention",
            "keys",
            "encoder_groups",
            "anchors",
            "anchor_tokens",
            "anchor_grid",
        }
    )

    def probe(self, model: Any) -> EncoderProbe:
        layers = self.inner(model).vision_model.encoder.layers
        return EncoderProbe([layer.self_attn for layer in layers], class_token=False)

    def blocks(self, model: Any, given: dict[str, Any]) -> EncoderBlocks:
        return EncoderBlocks(list(self.inner(model).vision_model.encoder.layers), class_token=False)

    @torch.no_grad()
    def latents(self, model: Any, given: dict[str, Any]) -> Signals:
        vq = self.inner(model).vqmodel
        pixels = given["pixel_values"].to(next(vq.parameters()).dtype)
        latent = vq.quant_conv(vq.encoder(pixels))  # [b, w, H, W]
        anchors, grid = anchors_of(latent, patch=1)
        # Nearest by cosine, as the released codebook was trained; `vq.quantize` compares distances.
        unit = F.normalize(latent.flatten(2).transpose(1, 2), dim=-1)
        codes = (unit @ F.normalize(vq.quantize.embedding.weight, dim=-1).T).argmax(dim=-1)
        tokens = model.prepare_embeddings_for_image_generation(codes)
        field = tokens.transpose(1, 2).unflatten(-1, tuple(latent.shape[-2:]))
        return Signals(
            anchors=anchors, anchor_tokens=anchors_of(field, patch=1)[0], anchor_grid=grid
        )
