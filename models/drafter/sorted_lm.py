"""A small language model with several exits (sorted fine-tuning; S2D, arXiv 2407.01955).

Shape legend: B sequences, T positions, N frontier nodes, d width of the drafter, D draft
vocabulary.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from models.drafter.base import Depth, Drafter, Frontier
from models.drafter.causal_lm import CausalLm
from models.head import Head
from models.lm_exits import ExitCache, RecalledHead, pieces, run_piece
from models.lm_shape import layer_list
from models.lm_state import LmState, Memory, plan_step
from models.target import Features, Target


class SortedLm(CausalLm):
    """A language model whose first n layers are a drafter too, for every n of `exits`.

        y^n_t = norm(h^n_t),  logits = U y^n_t      the same norm and head at every exit

    All exits are trained at each step, one `Depth` of shift 0 each (SoFT: the mean of their losses;
    here their sum, weighed by depth_decay), the last being the whole model, which serves.

    Drafting with `thresholds` (one for each exit before the last): after exit e, if max softmax is
    above the threshold, the draft is made from y^e; otherwise the next layers run. Nodes of a tree
    that stand at one depth leave together, when all of them are sure. A token that left early has
    no keys in deeper layers: its hidden state waits, and is read there with the next token that
    goes deeper. The exit depends on q alone and q is the distribution drawn from, so sampling stays
    exact. Without thresholds every draft takes all layers, and where a policy names an exit
    (`leave_at`) all drafts of the round leave there.

    One sorted model for several targets (S2D): with embedding=own and an own or tied head it serves
    every target with the same vocabulary. Train it for one, and go on for another with
    `start=runs/<name>/latest` under that target; `load_drafter(folder, other)` drafts for it as is.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        vocab_size: int,
        exits: list[int],
        thresholds: list[float] | None = None,
        target_config: dict[str, Any] | None = None,
        init: Literal["layers", "random", "source"] = "layers",
        num_layers: int | None = None,
        keep: Literal["first", "even", "importance"] = "first",
        source: str | None = None,
        embedding: Literal["target", "own"] = "target",
        lora: dict[str, Any] | None = None,
        draft_vocab_size: int | None = None,
        head: dict[str, Any],
        architecture: dict[str, Any] | None = None,
    ) -> None:
        self.exits = exits
        self.thresholds = thresholds
        super().__init__(
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            target_config=target_config,
            init=init,
            num_layers=num_layers,
            keep=keep,
            source=source,
            embedding=embedding,
            lora=lora,
            draft_vocab_size=draft_vocab_size,
            head=head,
            architecture=architecture,
        )
        self._check_thresholds()
        self.exits_taken = [0] * len(exits)
        """How often drafting left at each exit."""

    def _set_architecture(self, architecture: dict[str, Any]) -> None:
        total = architecture["num_hidden_layers"]
        rising = all(a < b for a, b in zip(self.exits, self.exits[1:], strict=False))
        if not self.exits or self.exits[0] < 1 or not rising or self.exits[-1] != total:
            raise ValueError(
                f"drafter.exits={self.exits} should be numbers of layers that rise from 1 or more "
                f"to {total}, all layers of this drafter, because the last exit is the whole "
                f"model; give such as [{max(1, total // 2)}, {total}]."
            )
        super()._set_architecture(architecture)
        # In lists: neither views nor the wrapped head are sub-modules of their own.
        self._pieces = [pieces(self.inner, self.exits)]
        self._recalled = [RecalledHead(self.vocab_head)]

    def _check_thresholds(self) -> None:
        given = self.thresholds
        if given is None:
            return
        if len(given) != len(self.exits) - 1 or not all(0.0 <= value <= 1.0 for value in given):
            raise ValueError(
                f"drafter.thresholds={given} should be {len(self.exits) - 1} probabilities, one "
                f"for each exit of {self.exits} but the last, because a draft leaves where the "
                "largest probability is above its threshold; give so many, or null for all layers."
            )

    @property
    def num_depths(self) -> int:
        return len(self.exits)

    def head(self, depth: int) -> Head:
        return self._recalled[0]

    def bind(self, target: Target) -> Drafter:
        super().bind(target)
        # Rows of an embedding are looked up one by one; all other weights are read for each draft.
        last = sum(p.numel() for p in self.vocab_head.parameters())
        rows = self.draft_vocab_size or self.vocab_size
        last = last or rows * self.hidden_size
        _, layers = layer_list(self.inner)
        sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
        whole = sum(p.numel() for p in target.model.parameters())
        costs = tuple((sum(sizes[:n]) + last) / whole for n in self.exits)
        self.exit_costs = costs if len(costs) > 1 else ()
        return self

    def unroll(self, features: Features, tokens_BT: Tensor) -> Iterator[Depth]:
        hidden_BTd = self.embed(tokens_BT)
        for view in self._pieces[0]:
            hidden_BTd = view(inputs_embeds=hidden_BTd, use_cache=False).last_hidden_state
            yield Depth(self.inner.norm(hidden_BTd), self.vocab_head, shift=0)

    def initial_state(self) -> LmState:
        return LmState(Memory(cache=ExitCache(self.exits)))

    def step(self, state: LmState, depth: int, frontier: Frontier) -> tuple[LmState, Tensor]:
        step = plan_step(state, depth, frontier)
        memory, rows = state.memory, len(frontier.tokens_N)
        cache = memory.cache
        assert isinstance(cache, ExitCache)
        flow_1Rd = states_Nd = self.embed(step.tokens_1N)
        e, last = 0, len(self.exits) - 1
        end = last if self.leave_at is None else self.leave_at
        for e, view in enumerate(self._pieces[0]):
            flow_1Rd = run_piece(view, e, flow_1Rd, memory, self.dtype)
            if e < end and (self.thresholds is None or self.leave_at is not None):
                continue
            states_Nd = self.inner.norm(flow_1Rd[:, -rows:])[0]
            if e == end or self._sure(e, states_Nd):
                break
        self.exits_taken[e] += 1
        if e < last:
            waiting = cache.waiting[e + 1]
            later = flow_1Rd if waiting is None else torch.cat([waiting, flow_1Rd], dim=1)
            cache.waiting[e + 1] = later
        return step.state, states_Nd

    def _sure(self, e: int, states_Nd: Tensor) -> bool:
        """Whether every row's largest probability is above the threshold of exit e."""
        assert self.thresholds is not None
        logits_ND = self.vocab_head(states_Nd)
        best_N = logits_ND.float().softmax(-1).amax(-1)
        if bool((best_N > self.thresholds[e]).all()):
            self._recalled[0].know(states_Nd, logits_ND)
            return True
        return False
