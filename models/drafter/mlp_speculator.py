"""MLP speculator (Wertheimer et al., 2024, arXiv 2404.19124).

Shape legend: B sequences, T positions, N tree nodes, k depth, d hidden size of the target, D inner
width, V target vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.drafter.base import Depth, Drafter, Frontier
from models.head import Head, build_head
from models.head.frozen import FrozenHead
from models.head.own import OwnHead
from models.head.tied import TiedHead
from models.target import Features, Target

EPS = 1e-6
"""Of every norm."""


class ShiftedNorm(nn.Module):
    """w x / sqrt(mean(x^2) + eps) + b. The released code calls it LayerNorm but takes no mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, EPS) + self.bias


class MlpSpeculator(Drafter):
    """A recurrent MLP of `n_predict` steps that begins at f_t and reads one token a step.

        s_{-1} = f_t, or with `scale_input` rms(f_t) / sqrt(2)
        s_k = GELU(norm_k(P_k s_{k-1} + beta E_k(x_{t+1+k})))
        logits_k = U_k s_k  predicts x_{t+2+k}

    P_0: d -> D, P_k: D -> D, no biases; E_k: V -> D, its own; rms(y) = y / sqrt(mean y^2).
    beta = sqrt((1 - s^2) D / 2) / s with s = 0.5^(1 / (2 n_predict)) keeps the share of f_t in the
    last state at one half. D = `inner_dim`, the target's d where null. `tie_weights`: one E, U and
    norm for all steps and one P_k for k >= 1.

    A reduced draft vocabulary restricts U alone: every token of the target can be read.

    `init`: random, as published (everything N(0, 1/D)), which wants a pretraining stage on plain
    text; or target, a deviation for short trainings: E starts from the target's embedding, scaled
    to the same spread, and U from the target's head.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        vocab_size: int,
        n_predict: int = 3,
        inner_dim: int | None = None,
        tie_weights: bool = True,
        scale_input: bool = True,
        init: Literal["random", "target"] = "random",
        draft_vocab_size: int | None = None,
        head: dict[str, Any],
    ) -> None:
        super().__init__(
            hidden_size=hidden_size, vocab_size=vocab_size, draft_vocab_size=draft_vocab_size
        )
        width = inner_dim or hidden_size
        if init == "target" and width != hidden_size:
            raise ValueError(
                f"drafter.init=target copies the target's embedding and head, which are "
                f"{hidden_size} wide, but drafter.inner_dim={width}; use init=random, or "
                "inner_dim=null."
            )
        self.n_predict, self.width, self.init = n_predict, width, init
        self.scale_input = scale_input
        state_share = 0.5 ** (0.5 / n_predict)
        self.beta = ((1 - state_share**2) * width / 2) ** 0.5 / state_share
        own = 1 if tie_weights else n_predict
        self.embeddings = nn.ModuleList(nn.Embedding(vocab_size, width) for _ in range(own))
        inner = min(own, n_predict - 1)  # P_k for k >= 1
        widths = [hidden_size] + [width] * inner
        self.projections = nn.ModuleList(nn.Linear(w, width, bias=False) for w in widths)
        self.norms = nn.ModuleList(ShiftedNorm(width) for _ in range(own))
        size = draft_vocab_size or vocab_size
        self.heads = nn.ModuleList(
            build_head(head, hidden_size=width, vocab_size=size) for _ in range(own)
        )
        self._start_randomly()

    def _start_randomly(self) -> None:
        """N(0, 1/D) for every matrix. A tied head is its step's embedding."""
        own = [*self.embeddings, *self.projections]
        for embedding, head in zip(self.embeddings, self.heads, strict=True):
            if isinstance(head, TiedHead):
                assert isinstance(embedding, nn.Embedding)
                head.tie(embedding)
            elif isinstance(head, OwnHead):
                own.append(head.linear)
            elif isinstance(head, FrozenHead) and self.width != self.hidden_size:
                raise ValueError(
                    f"head=frozen is the target's head with {self.hidden_size} columns, but "
                    f"drafter.inner_dim={self.width}; use head@drafter.head=own, or "
                    "inner_dim=null."
                )
        for module in own:
            nn.init.normal_(module.weight, std=self.width**-0.5)  # type: ignore[arg-type]

    @property
    def num_depths(self) -> int:
        return self.n_predict

    @property
    def state_size(self) -> int:
        return self.width

    @property
    def reads_history(self) -> bool:
        return False

    def head(self, depth: int) -> Head:
        return self._of(self.heads, depth)  # type: ignore[return-value]

    @staticmethod
    def _of(modules: nn.ModuleList, depth: int) -> nn.Module:
        """The module of a step: its own, or the shared one, which is the last there is."""
        return modules[min(depth, len(modules) - 1)]

    @torch.no_grad()
    def init_from(self, target: Target, calibration: Sequence[Tensor] = ()) -> None:
        if self.init == "random":
            return
        rows_Vd = target.embedding_weight_Vd.float()
        for embedding in self.embeddings:
            assert isinstance(embedding, nn.Embedding)
            embedding.weight.copy_(rows_Vd * (self.width**-0.5 / rows_Vd.std()))
        for head in self.heads:
            assert isinstance(head, Head)
            head.init_from(target, self.draft_ids_D)

    def _begin(self, final: Tensor) -> Tensor:
        """s_{-1} of features `[..., d]`."""
        return (
            F.rms_norm(final, (final.shape[-1],), None, EPS) / 2**0.5 if self.scale_input else final
        )

    def _cell(self, depth: int, state: Tensor, tokens: Tensor) -> Tensor:
        """s_k from s_{k-1} and x_{t+1+k}."""
        projected = self._of(self.projections, depth)(state)
        embedded = self._of(self.embeddings, depth)(tokens)
        return F.gelu(self._of(self.norms, depth)(projected + self.beta * embedded))

    def unroll(self, features: Features, tokens_BT: Tensor) -> Iterator[Depth]:
        state_BTd = self._begin(features.final_BTd)
        for k in range(self.n_predict):
            # x_{t+1+k} stands at index t; the last 1+k positions read token 0 and have no label.
            ahead_BT = F.pad(tokens_BT[:, 1 + k :], (0, 1 + k))[:, : tokens_BT.shape[1]]
            state_BTd = self._cell(k, state_BTd, ahead_BT)
            yield Depth(state_BTd, self.head(k), shift=1 + k)

    def extend(self, state: Any, features: Features, tokens_1N: Tensor) -> Tensor:
        """The state of drafting is s_{-1} of the last verified position, `[1, d]`."""
        return self._begin(features.final_BTd[:, -1])

    def step(self, state: Tensor, depth: int, frontier: Frontier) -> tuple[Tensor, Tensor]:
        """From then on it is s_k of each frontier node, `[N, D]`, along the node's own path."""
        grown_ND = self._cell(depth, state[frontier.parents_N], frontier.tokens_N)
        return grown_ND, grown_ND
