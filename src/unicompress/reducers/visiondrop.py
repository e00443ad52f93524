"""VisionDrop (arXiv 2506.22283): select and merge by visual attention, outside and inside the LM.

Before the language model as VisionZip; at 1/4, 1/2 and 3/4 of its depth the same again, where the
score is what a token receives from the image's own tokens (causal) in the layer that follows, and
no text is asked. Official counts are 42 + 6, then 30 + 5, 22 + 4 and 16 + 3 at layers 8, 16, 24 of
32; ours keeps these proportions, an eighth contextual. In the official code labels and masks index
two different spaces, which has no effect at inference.
"""

from unicompress.reducers.base import Keep, Step, reducers, scaled
from unicompress.reducers.visionzip import VisionZip

SHARES = (35 / 48, 26 / 48, 19 / 48)  # of the first budget, at the three cuts


class InnerZip(VisionZip):
    """The cut inside the language model; only VisionDrop uses it."""

    name = "visiondrop"
    needs = ("image_attention", "keys")
    scored_by = "image_attention"
    source = "next"


@reducers.register("visiondrop")
class VisionDrop(VisionZip):
    """`keep` before the language model; 0.73, 0.54 and 0.40 of that at the cuts inside."""

    def __init__(
        self,
        *,
        keep: Keep = 0.25,
        contextual: float = 1 / 8,
        merge: str = "sum",
        positions: str = "reindex",
    ):
        super().__init__(keep=keep, contextual=contextual, merge=merge, positions=positions)

    def steps(self, depth: int) -> tuple[Step, ...]:
        inner = InnerZip(
            keep=self.keep,
            contextual=self.contextual,
            merge=self.merge,
            positions=self.positions,
        )
        cuts = {max(1, depth * part // 4): share for part, share in enumerate(SHARES, start=1)}
        inside = [Step(layer, inner, scaled(self.keep, share)) for layer, share in cuts.items()]
        return (Step(0, self, self.keep), *inside)
