"""The pair of models that ships, on the same unseen picture and the same prompt.

python examples/ask_and_draw.py [FOLDER]
"""

import sys
import time
from pathlib import Path

from unicompress import UnifiedModel, reference
from unicompress.data.images import save_png, to_tensor, to_uint8
from unicompress.data.scenes import Scenes


def show(name: str, model: UnifiedModel, folder: Path) -> None:
    """Ask, describe and draw with one model."""
    sample = Scenes("test", size=model.tokenizer.spec.image_size)[3]
    image = to_tensor(sample.pixels)[None]
    print(f"{name}: {model.tokens_per_image} tokens, {model.interface_tokens} positions per image")
    questions = [question.text for question in sample.questions]
    (answers,) = model.answer(image, [questions])  # all of them in one pass over the image
    for question, answer in zip(sample.questions, answers, strict=True):
        print(f"  {question.text} {answer} (right: {question.answer})")
    print(f"  {model.describe(image)[0]}")
    start = time.perf_counter()
    drawing = model.draw([sample.caption], cfg=2.0, seed=1)
    print(f"  drawn in {time.perf_counter() - start:.2f} s: {sample.caption}")
    save_png(to_uint8(drawing[0]), folder / f"{name}.png")


def main(folder: str = "drawings") -> None:
    for name in ("dense", "compressed"):
        show(name, reference.load(name), Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
