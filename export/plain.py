"""A small language model as the matrices of a plain one, and that plain model read back.

Shape legend: N states, d hidden size, D draft vocabulary, V target vocabulary, T positions.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from export.base import UNLIMITED
from export.outside import outside_row, widen
from models.drafter.base import Drafter
from models.drafter.causal_lm import CausalLm
from models.head.own import OwnHead
from models.head.tied import TiedHead
from models.target import Features

MAX_TOKENS = 256


class PlainModel:
    """The folder, read by transformers alone, in fp32."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model: Any = model.to(device).eval()

    @torch.inference_mode()
    def draft(self, features: Features, tokens_1T: Tensor) -> list[int]:
        """Greedy, with transformers' own loop and cache; no token ends a draft."""
        knobs = GenerationConfig(do_sample=False, max_new_tokens=UNLIMITED, pad_token_id=0)
        self.model.generation_config = knobs  # nothing but argmax
        mask_1T = torch.ones_like(tokens_1T)
        out_1T = self.model.generate(tokens_1T, attention_mask=mask_1T)
        return out_1T[0, -UNLIMITED:].tolist()


def embedding_of(drafter: CausalLm) -> Tensor:
    """The matrix the drafter reads tokens with, its own or the target's."""
    if drafter.own_embedding:
        return drafter.inner.get_input_embeddings().weight.detach()
    return drafter.target.embedding_weight_Vd.to(drafter.dtype)


def head_of(drafter: CausalLm, embedding_Vd: Tensor, texts: Sequence[Tensor]) -> Tensor:
    """The matrix it predicts with, `[V, d]`, widened where the draft vocabulary is reduced."""
    head, ids_D = drafter.head(0), drafter.draft_ids_D
    if isinstance(head, OwnHead):
        rows_Dd = head.linear.weight.detach()
    else:
        tied = isinstance(head, TiedHead)
        weight_Vd = embedding_Vd if tied else drafter.target.head_weight_Vd.to(drafter.dtype)
        rows_Dd = weight_Vd if ids_D is None else weight_Vd[ids_D]
    if ids_D is None or len(ids_D) == drafter.vocab_size:
        return rows_Dd
    states_Nd, logits_ND = _look(drafter, texts)
    row_d = outside_row(states_Nd, logits_ND, drafter.vocab_size - len(ids_D))
    return widen(rows_Dd, ids_D, drafter.vocab_size, row_d)


@torch.inference_mode()
def _look(drafter: CausalLm, texts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """States and logits at every position of the texts."""
    assert texts, "a reduced vocabulary is widened by what states look like on text"
    device = drafter.target.device
    states_Nd = torch.cat([drafter.read(t[:MAX_TOKENS].to(device)[None])[0] for t in texts])
    return states_Nd, drafter.head(0)(states_Nd)


def logits_of(drafter: Drafter, tokens_1T: Tensor) -> Tensor:
    """The trained drafter's logits at every position, through its training view."""
    none = Features(torch.empty(1, tokens_1T.shape[1], 0))  # it reads tokens only
    depth = list(drafter.unroll(none, tokens_1T))[-1]
    return depth.head(depth.states_BNd)[0]
