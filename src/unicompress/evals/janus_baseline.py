"""An independent dense baseline: transformers' own image generation of Janus, at our shapes."""

from collections.abc import Callable

import torch
from transformers import JanusConfig, JanusForConditionalGeneration, JanusVisionConfig
from transformers.models.janus.configuration_janus import JanusVQVAEConfig

from unicompress.errors import InputError
from unicompress.generate import Sampling
from unicompress.unified import UnifiedModel

BEGIN, IMAGE, PADDING = 0, 1, 2  # ids of the prompt's start, of the image's start, and of padding


def janus_task(
    dense: UnifiedModel, *, prompts: int, length: int, sampling: Sampling
) -> Callable[[], object]:
    """Draws `prompts` pictures after prompts of `length` tokens, image decoder included.

    The language model and the image decoder are the dense model's own objects; the heads around
    them are Janus's, with random weights. It always computes both branches of guidance. Raises
    InputError for a language model that is no Llama, or tokens with several codes.
    """
    lm, host = dense.backbone.inner, dense.tokenizer.spec
    if lm.config.model_type != "llama" or host.codes_per_token != 1:
        raise InputError("the Janus baseline needs a Llama and a tokenizer with one code per token")
    janus = _janus(dense)

    def run() -> object:
        ids = torch.full((prompts, length), IMAGE + 2, device=dense.device)
        ids[:, 0], ids[:, -1] = BEGIN, IMAGE
        codes = janus.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_mode="image",
            do_sample=sampling.temperature > 0,
            guidance_scale=max(sampling.cfg, 1.01),
            max_length=length + host.grid.length,
        )
        return dense.decode_codes(codes[..., None])

    return run


def _janus(dense: UnifiedModel) -> JanusForConditionalGeneration:
    lm, host = dense.backbone.inner, dense.tokenizer.spec
    hidden = lm.config.hidden_size
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = {**lm.config.to_dict(), "num_hidden_layers": 1, "vocab_size": 8, "pad_token_id": None}
    config = JanusConfig(
        text_config=text,
        vision_config=JanusVisionConfig(
            **small,
            image_size=16 * host.grid.rows,
            projection_dim=hidden,
            num_image_tokens=host.grid.length,
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=host.code_dim,
            num_embeddings=host.codebook_size,
            base_channels=32,
            channel_multiplier=[1],
            num_res_blocks=1,
            projection_dim=hidden,
            image_token_embed_dim=hidden,
        ),
        image_token_id=IMAGE,
    )
    with torch.random.fork_rng():
        janus = JanusForConditionalGeneration(config)
    janus = janus.to(dense.device, lm.dtype).eval()
    janus.model.language_model = lm.base_model
    janus.config.text_config.num_hidden_layers = lm.config.num_hidden_layers  # sizes its cache
    options = janus.generation_config
    options.bos_token_id, options.pad_token_id, options.eos_token_id = BEGIN, PADDING, None
    options.generation_kwargs = {"boi_token_id": IMAGE}
    return janus
