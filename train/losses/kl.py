"""Kullback-Leibler divergences and their relatives.

Shape legend: N rows, C columns in which p and q are compared (see base.py).
"""

from torch import Tensor

from train.losses.base import RowLoss, Rows


class ForwardKL(RowLoss):
    """KL(p || q) = sum_v p_v (log p_v - log q_v): soft cross-entropy less the entropy of p.

    The entropy does not depend on q, so this trains exactly like the soft cross-entropy of Hydra++
    (arXiv 2402.05109, "teacher loss") and DistillSpec's FKL (arXiv 2310.08461), while its value is
    0 where q = p. The sum runs over the draft vocabulary with p's full-vocabulary mass P_D <= 1
    there. Gradient in the draft logits: P_D q - p.
    """

    needs_target = True

    def __call__(self, rows: Rows) -> Tensor:
        assert rows.target is not None
        cross_N = (rows.target.p_ND * rows.logq_NC).sum(-1)
        return rows.target.negative_entropy_N - cross_N
