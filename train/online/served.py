"""What serving one prompt leaves behind to learn from, and a batch made of it.

Where a refused draft is taught, in words. A round begins when answer tokens y_0..y_{i-1} are known;
its draft k is put to the test at y_{i+k}, which stands at position P+i+k of the text (P prompt
tokens). When drafts 0..a-1 were accepted and draft a was refused, the token there was corrected to
x_{u+1} = y_{i+a}, so the teacher position is u = P+i+a-1: p_u is the law that the corrected token
was taken from, and the draft state that was wrong is the one at index t = u - shift of depth a. One
position later (u = P+i+a, where x_{u+1} is the token *after* the corrected one) is the released
code's mistake. When all drafts of a round were accepted, its last token is a bonus that nobody
drafted: it is no error.

Shape legend: B sequences, T positions, N positions with features, E errors, A accepted drafts,
M chosen (sequence, u, k) triples, K depths.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from decode.session import Generation, Round
from models.drafter.base import Depth, served_depth
from models.target import Features


@dataclass(frozen=True)
class Served:
    """A text, the target's features that decoding it made, and where drafts were tested.

    `tokens_T` is the prompt (`prompt` tokens) and the answer. The features are those of positions
    first..T-2 (the last token was never read). Rows of `error_E2` and `accepted_A2` are (u, k):
    teacher position and draft depth.
    """

    tokens_T: Tensor
    prompt: int
    first: int
    final_Nd: Tensor
    layers: dict[int, Tensor]
    error_E2: Tensor
    accepted_A2: Tensor

    @property
    def answer(self) -> int:
        """Answer tokens."""
        return len(self.tokens_T) - self.prompt

    def state_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


class Listener:
    """Keeps the target's features while a prompt is decoded (`Decoder.generate(on_read=...)`)."""

    def __init__(self) -> None:
        self._parts: list[Features] = []

    def __call__(self, features: Features) -> None:
        self._parts.append(features)

    def served(self, prompt: list[int], made: Generation, *, whole: bool) -> Served:
        """The record of this answer. `whole` keeps the prompt's features too; otherwise only those
        that are taught with, from the prompt's last position on."""
        tokens_T = torch.tensor(prompt + made.tokens)
        first = 0 if whole else len(prompt) - 1
        errors, accepted = refused_and_accepted(made.rounds, len(prompt), len(tokens_T))
        return Served(
            tokens_T=tokens_T,
            prompt=len(prompt),
            first=first,
            final_Nd=self._join([p.final_BTd for p in self._parts], first, len(tokens_T)),
            layers={
                k: self._join([p.layers[k] for p in self._parts], first, len(tokens_T))
                for k in self._parts[0].layers
                if whole
            },
            error_E2=torch.tensor(errors, dtype=torch.long).view(-1, 2),
            accepted_A2=torch.tensor(accepted, dtype=torch.long).view(-1, 2),
        )

    @staticmethod
    def _join(parts: list[Tensor], first: int, length: int) -> Tensor:
        # Joined outside of inference mode, so that the result may take part in training.
        return torch.cat(parts, dim=1)[0, first : length - 1].clone().cpu()


def refused_and_accepted(
    rounds: Sequence[Round], prompt: int, length: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(u, k) of every refused draft, and of every accepted one, within a text of `length` tokens.

    A tree's depth counts as refused when none of the drafts tested there was kept.
    """
    errors, accepted = [], []
    i = 1  # y_0 came from the prompt's forward
    for done in rounds:
        accepted += [(prompt + i + k - 1, k) for k in range(done.accepted)]
        if done.tested > done.accepted:
            errors.append((prompt + i + done.accepted - 1, done.accepted))
        i += done.produced
    # What lies beyond the end of the answer was cut off by max_new_tokens: x_{u+1} is not there.
    inside = length - 2
    return [e for e in errors if e[0] <= inside], [a for a in accepted if a[0] <= inside]


@dataclass(frozen=True)
class Texts:
    """Several served texts, padded on the right; features are zero where none were kept."""

    tokens_BT: Tensor
    features: Features

    @staticmethod
    def of(served: Sequence[Served], device: torch.device, dtype: torch.dtype) -> "Texts":
        longest = max(len(s.tokens_T) for s in served)
        tokens_BT = torch.zeros(len(served), longest, dtype=torch.long)
        for b, one in enumerate(served):
            tokens_BT[b, : len(one.tokens_T)] = one.tokens_T

        def padded(parts: list[Tensor]) -> Tensor:
            out_BTd = torch.zeros(len(parts), longest, parts[0].shape[-1], dtype=dtype)
            for b, (one, part_Nd) in enumerate(zip(served, parts, strict=True)):
                out_BTd[b, one.first : one.first + len(part_Nd)] = part_Nd
            return out_BTd.to(device)

        features = Features(
            padded([s.final_Nd for s in served]),
            {k: padded([s.layers[k] for s in served]) for k in served[0].layers},
        )
        return Texts(tokens_BT.to(device), features)


def only(depths: Sequence[Depth], chosen_M3: Tensor, shape: tuple[int, int]) -> list[Depth]:
    """The depths with a mask that leaves the chosen (sequence, u, k) and nothing else.

    Draft k is taught through the depth that served it. All exits of a recurrent family learn at
    every chosen position, so that none of them falls behind.
    """
    recurrent = depths[-1].shift == 0
    b_M, u_M, k_M = chosen_M3.unbind(-1)
    served = torch.tensor([served_depth(depths, k) for k in k_M.tolist()], dtype=torch.long)
    masked = []
    for v, depth in enumerate(depths):
        device = depth.states_BNd.device
        # The state at index t = u - shift is the one that p_u teaches.
        t_M = u_M - depth.shift
        mine_M = (t_M >= 0) & (recurrent | (served == v))
        mask_BT = torch.zeros(shape, dtype=torch.bool)
        mask_BT[b_M[mine_M], t_M[mine_M]] = True
        mask_BN = mask_BT.to(device)
        if depth.positions_BN is not None:
            mask_BN = mask_BN.gather(1, depth.positions_BN.clamp(max=shape[1] - 1))
        if depth.mask_BN is not None:
            mask_BN = mask_BN & depth.mask_BN
        masked.append(dataclasses.replace(depth, mask_BN=mask_BN))
    return masked
