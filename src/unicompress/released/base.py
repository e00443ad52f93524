"""Released unified models: what a loader makes of somebody else's checkpoint folder."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from unicompress.errors import CheckpointError
from unicompress.feature_taps import FeatureTap
from unicompress.registry import Family, Member
from unicompress.tokenizers.base import HostFacts, ImageTokenizer

# Parts that a plug-in with codebooks of its own brings anew: no checkpoint has them.
NEW = ("tables.global.", "heads.global.")
OWN = ("tables.local.", "heads.local.")


@dataclass(frozen=True)
class Release:
    """The parts of a released model, in the shape that `UnifiedModel.from_parts` takes."""

    tokenizer: ImageTokenizer
    lm: PreTrainedModel
    text_tokenizer: PreTrainedTokenizerFast
    backbone: str  # spec
    projector: str  # spec
    state: dict[str, Tensor]  # weights of the backbone besides its language model
    tap: FeatureTap | None = None
    understanding_source: str = "continuous"

    def fill(self, backbone: nn.Module, *, own: bool) -> None:
        """Copy the released weights into a backbone.

        The released embeddings and head know the host's codes alone: with `own`, a codebook of the
        plug-in's for the local tokens, theirs stay random. CheckpointError where anything does not
        fit.
        """
        state = {k: v for k, v in self.state.items() if not (own and k.startswith(OWN))}
        expected = {k: v for k, v in backbone.state_dict().items() if not k.startswith("lm.")}
        excused = (*NEW, *OWN) if own else NEW
        missing = [k for k in expected if k not in state and not k.startswith(excused)]
        wrong = [k for k, v in state.items() if k not in expected or expected[k].shape != v.shape]
        if missing or wrong:
            name = (missing or wrong)[0]
            problem = "lacks" if missing else "has a misfitting"
            raise CheckpointError(
                f"the released model {problem} {name} ({len(missing)} missing, {len(wrong)} "
                "misfitting): its configuration and its weights are of different models"
            )
        backbone.load_state_dict(state, strict=False)


class ReleaseLoader(Member, ABC):
    """Reads the checkpoint folders of one kind, known by the `model_type` in their config.json."""

    files: ClassVar[tuple[str, ...]]  # patterns of what is needed from a hub repository
    facts: ClassVar[HostFacts] = HostFacts()
    hub: ClassVar[str] = ""  # where the weights were released
    title: ClassVar[str] = ""  # how people call the model, where its `model_type` does not say

    @abstractmethod
    def load(self, source: Path | str, *, revision: str | None = None) -> Release:
        """The parts with their weights; CheckpointError for damaged, foreign or missing files."""


releases: Family[ReleaseLoader] = Family("released model", home="unicompress.released")
