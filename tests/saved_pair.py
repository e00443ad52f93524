"""The tiny pair of eval_pair on disk, each model with a language model of its own."""

from pathlib import Path

from eval_pair import SIDE, SPEC
from unicompress.codec import ImageCodec
from unicompress.evals.language_models import caption_tokenizer, random_lm
from unicompress.tokenizers.toy import ToySingle
from unicompress.unified import UnifiedModel


def save_tiny_pair(folder: Path) -> None:
    """Write `dense` and `compressed`: 64 dense tokens against 4 + 16, random weights."""
    tokenizer = ToySingle(rows=8, columns=8).freeze()
    for name, codec in (("dense", None), ("compressed", ImageCodec(tokenizer, SPEC).eval())):
        model = UnifiedModel.from_parts(
            tokenizer=tokenizer,
            codec=codec,
            lm=random_lm("tiny"),
            text_tokenizer=caption_tokenizer(SIDE),
        )
        model.eval().save_pretrained(folder / name)
