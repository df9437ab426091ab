"""What a rule that ends drafts early may look at.

A token that was drawn from q has to be verified: leaving it out because of what it is would bias
the output (with p = q = (0.7, 0.3), refusing to submit the second token gives 0.7 + 0.3 * 0.7 to
the first). A rule here is therefore asked about the row a token is drawn from, never about the
token, and the token is submitted in either case: the draft ends *behind* it.

Shape legend: N frontier nodes, D draft vocabulary.
"""

from typing import Protocol

from torch import Tensor


class Stop(Protocol):
    """Ends a draft behind tokens that are probably wrong.

    A rule may keep what it needs of a draft from depth to depth, and begins anew at depth 0.
    """

    @property
    def name(self) -> str:
        """The rule in a word, for folders and tables."""
        ...

    def ends(self, depth: int, logits_ND: Tensor) -> Tensor:
        """Booleans `[N]`: whose rows' tokens, at this depth, are the last of their path."""
        ...
