"""Clover-2 (Xiao et al., 2024, arXiv 2408.00264).

Shape legend: B sequences, T positions, N tree nodes, H heads, c head size, k depth, d hidden size.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.cache import GrowingCache
from models.drafter.base import Depth, Drafter, Frontier
from models.head import Head, build_head
from models.lm_shape import build_inner, with_layers
from models.lm_weights import load_weights, target_weights
from models.scales import typical_sizes
from models.target import Features, Target

EPS = 1e-6
SPREAD = 0.01
"""Matrices start as U(0, 0.01), plus the identity where that means "pass on"."""


class GatedToken(nn.Module):
    """x + cos(q_h, k_h) v_h, head by head: a token y told to a state x as far as they agree.

    q = A rms(x), k = B y, v = C y, all d x d with bias. The paper calls it an attention block; with
    one key the weight is the cosine itself. At the start A and B pass on and C is small, as
    published: y is then told with about nothing, and the product of two small things has hardly a
    gradient. `tell` begins otherwise.
    """

    def __init__(self, *, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.RMSNorm(hidden_size, eps=EPS)
        self.query = passing(nn.Linear(hidden_size, hidden_size))
        self.key = passing(nn.Linear(hidden_size, hidden_size))
        self.value = passing(nn.Linear(hidden_size, hidden_size), identity=False)

    @torch.no_grad()
    def tell(self, scale: float) -> None:
        """Begin as about x + 0.7 `scale` y: biases of one give q and k a common direction (the
        cosine of rms(x) + 1 and 1 is 1 / sqrt(2)), and v = scale y."""
        nn.init.ones_(self.query.bias)
        nn.init.ones_(self.key.bias)
        self.value.weight.copy_(scale * torch.eye(len(self.value.weight)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        made = (self.query(self.norm(x)), self.key(y), self.value(y))
        q_Hc, k_Hc, v_Hc = (z.unflatten(-1, (self.num_heads, -1)) for z in made)
        weight_H = F.cosine_similarity(q_Hc, k_Hc, dim=-1, eps=EPS)
        return x + (weight_H[..., None] * v_Hc).flatten(-2)


@torch.no_grad()
def passing(linear: nn.Linear, *, identity: bool = True) -> nn.Linear:
    """The published start: U(0, 0.01), plus the identity on the first d inputs."""
    nn.init.uniform_(linear.weight, 0.0, SPREAD)
    nn.init.zeros_(linear.bias)
    if identity:
        linear.weight[:, : linear.out_features] += torch.eye(linear.out_features)
    return linear


@dataclass(frozen=True)
class CloverState:
    """The augmenting block's cache over verified positions, and s^k of each frontier node."""

    cache: GrowingCache
    states_Nd: Tensor | None = None


class Clover2(Drafter):
    """Reads the tokens so far, each told to the state of the one before.

        s^0_t = N(block(R_1(g_{<=t}, w_{<=t+1})))             the augmenting block: causal over t
        o^0_t = N_o(M_1 s^0_t)
        s^k_t = R_2(s^{k-1}_t, w_{t+1+k}),  o^k_t = N_o(M_2 [s^k_t; w_{t+1+k}])   for k >= 1
        logits = W o^k_t predict x_{t+2+k};  o^k_t itself predicts f_{t+1+k}

    w_j is the row of token x_j in the target's vocabulary head (frozen, not stored), R a
    `GatedToken`, the block `num_layers` decoder layers of the target's architecture (they start as
    its last ones), N and N_o norms (they start as its final norm), W `head`, one for all depths.
    R_2, M_2 and N_o serve all later depths. g is the stream before the target's final norm with
    `input`=residual (layer L of its L layers); with `input`=final it is f, after the norm, which is
    a deviation: feature shards have it without asking for another layer.

    Loss: sum_k 0.7^k (10 SmoothL1(o^k_t, f_{t+1+k}) + 1.0 soft cross-entropy(p_{t+1+k}, q)).

    With `gates`=told the gates begin by telling tokens in the size of the states they are told to,
    so that the first draft knows its token from the first step on; `published` needs a training
    many times longer for that (`GatedToken`).

    Deviations from the released code: the layers start from the last ones, each from its own (there
    all from one layer); losses count the tokens to learn (there the mask is not shifted).
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        vocab_size: int,
        target_config: dict[str, Any],
        input: Literal["residual", "final"] = "residual",
        gates: Literal["told", "published"] = "told",
        num_heads: int = 5,
        num_layers: int = 2,
        draft_vocab_size: int | None = None,
        head: dict[str, Any],
    ) -> None:
        super().__init__(
            hidden_size=hidden_size, vocab_size=vocab_size, draft_vocab_size=draft_vocab_size
        )
        total = target_config["num_hidden_layers"]
        if not 1 <= num_layers <= total:
            raise ValueError(
                f"drafter.num_layers={num_layers} should lie between 1 and {total}, the number of "
                "the target's layers, because they start from its last ones; give another number."
            )
        self.num_heads, self.gates = num_heads, gates
        self.feature_layers = (total,) if input == "residual" else ()
        self.kept = tuple(range(total - num_layers, total))
        shape = with_layers(target_config, self.kept) | {"dtype": None}
        self.inner: Any = build_inner(shape, own_embedding=False)
        if not isinstance(getattr(self.inner, "norm", None), nn.Module):
            raise ValueError(
                f"The final norm of {type(self.inner).__name__} is not where it is expected "
                "(norm), so clover2 cannot be built for this target; use drafter=hydra_heads."
            )
        heads = math.gcd(hidden_size, target_config["num_attention_heads"])
        self.first = GatedToken(hidden_size=hidden_size, num_heads=heads)
        self.later = GatedToken(hidden_size=hidden_size, num_heads=heads)
        self.first_out = passing(nn.Linear(hidden_size, hidden_size))
        self.later_out = passing(nn.Linear(2 * hidden_size, hidden_size))
        self.out_norm: nn.Module = copy.deepcopy(self.inner.norm)
        self.lm_head = build_head(
            head, hidden_size=hidden_size, vocab_size=draft_vocab_size or vocab_size
        )

    @property
    def num_depths(self) -> int:
        return self.num_heads

    def head(self, depth: int) -> Head:
        return self.lm_head

    def init_from(self, target: Target, calibration: Sequence[Tensor] = ()) -> None:
        load_weights(self.inner, target_weights(target, self.kept), own_embedding=False)
        self.out_norm.load_state_dict(self.inner.norm.state_dict())
        self.lm_head.init_from(target, self.draft_ids_D)
        if self.gates == "told":
            told = float(target.head_weight_Vd.float().square().mean().sqrt())
            first = later = 1.0
            if calibration:
                sizes = typical_sizes(target, calibration, self.feature_layers)
                first = later = sizes.final
                if self.feature_layers:
                    first = sizes.layers[self.feature_layers[0]]
            self.first.tell(first / told)
            self.later.tell(later / told)

    def _told(self, tokens: Tensor) -> Tensor:
        """w: rows of the target's vocabulary head."""
        return self.target.head_weight_Vd[tokens].to(self.dtype)

    def _given(self, features: Features) -> Tensor:
        """g of every position."""
        return (
            features.layers[self.feature_layers[0]] if self.feature_layers else features.final_BTd
        )

    def _block(self, given_BTd: Tensor, told_BTd: Tensor, cache: GrowingCache | None) -> Tensor:
        """s^0; positions go on where the cache ends."""
        return self.inner(
            inputs_embeds=self.first(given_BTd, told_BTd),
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    def _out(self, depth: int, state: Tensor, told: Tensor) -> Tensor:
        """o^k of s^k."""
        if depth == 0:
            return self.out_norm(self.first_out(state))
        return self.out_norm(self.later_out(torch.cat([state, told], dim=-1)))

    def unroll(self, features: Features, tokens_BT: Tensor) -> Iterator[Depth]:
        told_BTd = self._told(tokens_BT)
        T = tokens_BT.shape[1]
        state_BTd = self._given(features)
        for k in range(self.num_heads):
            # w_{t+1+k} stands at index t; the last 1+k positions read zeros and have no label.
            ahead_BTd = F.pad(told_BTd[:, 1 + k :], (0, 0, 0, min(1 + k, T)))
            if k == 0:
                state_BTd = self._block(state_BTd, ahead_BTd, None)
            else:
                state_BTd = self.later(state_BTd, ahead_BTd)
            out_BTd = self._out(k, state_BTd, ahead_BTd)
            yield Depth(out_BTd, self.lm_head, shift=1 + k, feature_BNd=out_BTd)

    def initial_state(self) -> CloverState:
        return CloverState(GrowingCache())

    def extend(self, state: CloverState, features: Features, tokens_1N: Tensor) -> CloverState:
        """Row t reads g_t and x_{t+1}: the last one has already read the root of the next draft."""
        states_1Nd = self._block(self._given(features), self._told(tokens_1N), state.cache)
        return CloverState(state.cache, states_1Nd[:, -1])

    def step(
        self, state: CloverState, depth: int, frontier: Frontier
    ) -> tuple[CloverState, Tensor]:
        assert state.states_Nd is not None, "extend or start comes before step"
        states_Nd, told_Nd = state.states_Nd, self._told(frontier.tokens_N)
        if depth > 0:
            states_Nd = self.later(states_Nd[frontier.parents_N], told_Nd)
        return replace(state, states_Nd=states_Nd), self._out(depth, states_Nd, told_Nd)
