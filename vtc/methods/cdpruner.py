"""CDPruner: keep tokens that differ from each other, given what the question is about."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

import vtc.cover as cover
import vtc.scores as scores
from vtc.choice import Seen
from vtc.observe import QuestionCosine, TokenStates
from vtc.stage import Method, Shape, Stage


@dataclass(frozen=True)
class CDPruner(Method):
    """The greedy MAP of a determinantal point process over the projected tokens, conditioned on the question.

    "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs" (arXiv 2506.10967),
    released code: the kernel is r_i cos(x_i, x_j) r_j of the projected tokens, r the relevance scaled to (0, 1].

    The paper's relevance needs CLIP's text tower, which checkpoints of Hugging Face do not carry. Here it is what the
    authors use where there is none: the mean cosine of a projected token with the text after the image, as the decoder
    embeds it. With CLIP the released code negates the cosine: `negated`. It is scaled over the image, not over the
    batch. Tiles of an image compete, and survivors keep their positions.
    """

    negated: bool = False
    """Whether the tokens that are least alike the question count as relevant, as the released code does for CLIP."""

    name: ClassVar[str] = "cdpruner"
    paper: ClassVar[str] = "CDPruner, arXiv 2506.10967"

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        features, question = TokenStates(0), QuestionCosine(0)

        def relevance(seen: Seen) -> Tensor:
            cosine = seen[question][:, 0]
            return scores.unit(-cosine if self.negated else cosine, seen.valid) + 1e-6

        return (Stage(0, relevance, (features, question), partial(cover.dpp, of=features)),)
