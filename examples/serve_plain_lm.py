"""Export to a plain causal LM, and draw with transformers alone, as any server could.

python examples/serve_plain_lm.py [FOLDER]
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from unicompress import reference
from unicompress.data.images import save_png, to_uint8
from unicompress.export import ImageSlots, codes_of


def main(folder: str = "plain-lm") -> None:
    unified = reference.load("compressed")
    unified.export_causal_lm(folder)

    # From here on to the ids nothing of unicompress is at work but the list of allowed entries.
    text = AutoTokenizer.from_pretrained(folder)
    lm = AutoModelForCausalLM.from_pretrained(folder)
    prompt = text("a large red circle<img:begin>", return_tensors="pt", add_special_tokens=False)
    ids = lm.generate(
        prompt["input_ids"],
        attention_mask=prompt["attention_mask"],
        do_sample=False,
        max_new_tokens=unified.interface_tokens - 1,
        logits_processor=[ImageSlots(folder)],
    )
    written = ids[:, prompt["input_ids"].shape[1] :]
    print(text.decode(written[0][:8]), "...")

    codes = codes_of(written, unified.layout, unified.backbone.space)
    path = Path(folder) / "drawing.png"
    save_png(to_uint8(unified.decode_codes(codes)[0]), path)
    print(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
