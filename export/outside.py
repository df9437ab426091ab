"""A head over a reduced vocabulary as a full-width matrix without a bias.

A plain language model has one row for every token. Rows of the draft vocabulary keep their place;
all others get one and the same row r whose logit must be far below, or a sampled draft (temperature
1) would land outside and a calibrated q would be another one. Copying a bias of -inf is not
possible: these architectures have none. But states after a final norm share a strong direction m,
so r = -c m gives the logit -c (m . y), and

    outside mass = O exp(-c m.y) / (Z + O exp(-c m.y)),   Z = sum over the draft vocabulary

with O rows outside. The plain mean of the states is not enough (on SmolLM2-135M some states of real
text have a negative product with it); the mean whitened by the second moment is, because it solves
min_m |Y m - 1|^2 with a little ridge: a product near 1 with every state. `outside_row` refuses when
some state has none, and the exporter measures the mass on other text afterwards.

Shape legend: N states, d hidden size, D draft vocabulary, V target vocabulary.
"""

import math

import torch
from torch import Tensor

MASS = 1e-6
"""The most probability that may lie outside the draft vocabulary, at temperature 1."""
RIDGE = 1e-3
SAFETY = 4.0
"""On other text the smallest product m.y was half of that on the text m was made from."""
ADVICE = (
    "train the drafter with a head over the whole vocabulary (drafter.draft_vocab_size=null), or "
    "use exporter=hf"
)


def outside_row(states_Nd: Tensor, logits_ND: Tensor, outside: int) -> Tensor:
    """r = -c m for `outside` rows. Raises ValueError when no c can do it on these states."""
    states_Nd, logits_ND = states_Nd.double(), logits_ND.double()
    second_dd = states_Nd.T @ states_Nd / len(states_Nd)
    ridge = RIDGE * second_dd.diagonal().mean()
    eye_dd = torch.eye(len(second_dd), dtype=second_dd.dtype, device=second_dd.device)
    m_d = torch.linalg.solve(second_dd + ridge * eye_dd, states_Nd.mean(0))
    m_d = m_d / m_d.norm()
    along_N = states_Nd @ m_d
    if not bool((along_N > 0).all()):
        raise ValueError(
            f"{int((along_N <= 0).sum()):,} of {len(along_N):,} final states of this drafter share "
            "no direction with the others, expected none, because the tokens outside its draft "
            f"vocabulary need a row that gives them a low logit in every state; {ADVICE}."
        )
    # O exp(-c s) <= MASS * Z for the worst state; a Z above 1 is not relied upon.
    least_Z_N = logits_ND.logsumexp(-1).clamp(max=0.0)
    c = SAFETY * ((math.log(outside / MASS) - least_Z_N) / along_N).max()
    return (-c * m_d).float()


def widen(weight_Dd: Tensor, ids_D: Tensor, vocab_size: int, row_d: Tensor) -> Tensor:
    """`[V, d]`: the draft vocabulary's rows at their ids, `row_d` everywhere else."""
    wide_Vd = row_d.to(weight_Dd).repeat(vocab_size, 1)
    wide_Vd[ids_D] = weight_Dd
    return wide_Vd


def outside_mass(logits_NV: Tensor, ids_D: Tensor) -> Tensor:
    """`[N]`: probability outside the draft vocabulary at temperature 1."""
    inside_N = logits_NV[:, ids_D].double().logsumexp(-1)
    outside_NO = logits_NV.double().index_fill(-1, ids_D, float("-inf"))
    # q_out = 1 / (1 + Z_in / Z_out): no difference of two numbers near 1.
    return torch.sigmoid(outside_NO.logsumexp(-1) - inside_N)
