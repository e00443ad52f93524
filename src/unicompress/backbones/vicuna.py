"""The conversation that VILA-U and UniTok were trained with: Vicuna's, version 1."""

from unicompress.backbones.base import Prompts

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# What stands before an image that is read, and the parts of what follows it.
OPENING = f"{SYSTEM} USER: "
QUESTION = ("\n{} ASSISTANT:",)


def vicuna(*, caption: str, unconditional: str) -> Prompts:
    """Questions in Vicuna's words, which both models share; they differ in how they draw.

    The published scripts of both ask about an image without its start and end tokens.
    """
    return Prompts(
        opening=OPENING,
        question=QUESTION,
        caption=caption,
        unconditional=unconditional,
        bare=True,
    )
