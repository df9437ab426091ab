"""The reference speculative decoder: one sequence, one target, a drafter (or baseline) or none.

A round: the drafter grows a tree from the root x_{t+1}, the last token known; the target reads the
whole tree in one forward; the verifier keeps a path and adds a token, which is the next root; the
cache and the drafter keep the path only. Without a drafter the tree is the root alone, and the same
code is plain autoregressive decoding.

Shape legend: B sequences (always 1), T positions, N tree nodes, d hidden size, V vocabulary.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from decode.baselines.base import Baseline
from decode.chance import SeededChance
from decode.verifier.base import TargetLaw, Verifier
from models.cache import GrowingCache
from models.drafter.base import Drafter, Policy, Tree
from models.lm_state import additive, has_window
from models.sampling import probabilities
from models.split import SharedLayers
from models.target import Features, Target


@dataclass(frozen=True)
class Round:
    """One target forward after the prompt, and what it cost.

    `nodes` tokens were read by the target (root included), `depth` is the deepest draft,
    `accepted` the drafts kept, `produced` the tokens gained (bonus included; 1 + accepted unless an
    end-of-answer token cut the path). `tested` depths had a draft put to the test: depth k
    (0-based) was reached when k < tested, and passed when k < accepted.
    """

    nodes: int
    depth: int
    accepted: int
    tested: int
    produced: int
    draft_s: float
    target_s: float
    verify_s: float


@dataclass(frozen=True)
class Generation:
    """The new tokens (the end-of-answer token included) and the rounds that made them.

    The first token comes from the prompt's forward and belongs to no round.
    """

    tokens: list[int]
    finish_reason: Literal["eos", "length"]
    rounds: list[Round]
    prefill_s: float
    total_s: float

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time after the prompt, by part."""
        return {
            "target": sum(r.target_s for r in self.rounds),
            "draft": sum(r.draft_s for r in self.rounds),
            "verify": sum(r.verify_s for r in self.rounds),
        }


class Decoder:
    """Generates with a target, sped up by a drafter when there is one.

    The output has the target's distribution (its argmax at temperature 0) unless the verifier is
    lossy. Draws depend on `seed` and on the order of calls.
    """

    def __init__(
        self,
        *,
        target: Target,
        drafter: Drafter | Baseline | None,
        verifier: Verifier,
        policy: Policy | None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> None:
        assert isinstance(drafter, Drafter) == (policy is not None), (
            "a drafter and a policy come together"
        )
        if temperature > 0.0 and verifier.greedy_only:
            raise ValueError(
                f"temperature={temperature} was asked for with greedy verification, which is only "
                "exact at temperature 0, because it keeps the target's best token and no other; "
                "use verifier=sampling, or temperature=0."
            )
        self.target = target
        self.drafter = drafter
        self.verifier = verifier
        self.policy = policy
        self.temperature = temperature
        self.top_p = top_p
        self._layers = drafter.feature_layers if drafter is not None else ()
        self._shared: SharedLayers | None = None
        self._chance = SeededChance(seed=seed)

    @torch.inference_mode()
    def generate(
        self,
        prompt: list[int],
        *,
        max_new_tokens: int,
        stop_at_eos: bool = True,
        on_read: Callable[[Features], None] | None = None,
    ) -> Generation:
        """Continue `prompt` by at most `max_new_tokens` tokens.

        `on_read` is given the target's features of all positions that stay, in order: those of the
        prompt, then each round's root and accepted drafts. The last token of the answer may come
        without (it was never read) and the last round may go beyond the answer.
        """
        self._check(prompt, max_new_tokens)
        begin = self._now()
        ends = set(self.target.eos_ids) if stop_at_eos else set()
        cache = GrowingCache()
        prompt_BT = torch.tensor([prompt], device=self.target.device)
        features = self.target.forward(prompt_BT, cache=cache, layers=self._layers)
        if on_read is not None:
            on_read(features)
        # Only the last position is projected: the others would cost V logits each, for nothing.
        logits_1V = self.target.project(features.final_BTd[0, -1:])
        token = self._chance.draw(self._law(logits_1V)(0))
        state = self._shared = None
        if self.drafter is not None:
            known_BT = torch.cat([prompt_BT, self._tensor([token])[None]], dim=1)
            features = features.to(self.drafter.dtype)
            if isinstance(self.drafter, Drafter) and self.drafter.computed_layers:
                state, self._shared = self.drafter.start_shared(features, known_BT, cache)
            else:
                state = self.drafter.start(features, known_BT)
        tokens, rounds = [token], []
        prefill_s = self._now() - begin
        while tokens[-1] not in ends and len(tokens) < max_new_tokens:
            state, new, done = self._round(state, tokens[-1], cache, ends, on_read)
            tokens += new
            rounds.append(done)
        tokens = tokens[:max_new_tokens]
        reason = "eos" if tokens[-1] in ends else "length"
        return Generation(tokens, reason, rounds, prefill_s, self._now() - begin)

    def _round(
        self,
        state: Any,
        root: int,
        cache: GrowingCache,
        ends: set[int],
        on_read: Callable[[Features], None] | None,
    ) -> tuple[Any, list[int], Round]:
        """Draft, read, verify, keep. Returns the drafting state, the new tokens and the record."""
        past = cache.get_seq_length()
        begin = self._now()
        tree = self._draft(state, root)
        drafted = self._now()
        features = self._read(tree, cache, past)
        # One product projects all nodes: the head is bound by reading its weights, so N rows cost
        # little more than one.
        logits_NV = self.target.project(features.final_BTd[0])
        read = self._now()

        verdict = self.verifier.verify(tree, self._law(logits_NV), self._chance)
        path, last = verdict.path, verdict.path[-1]
        drafts = tree.tokens_N.tolist()
        new = [*(drafts[node] for node in path[1:]), verdict.token]
        tested = len(path) - 1 + int(last in tree.parents_N.tolist())
        end = next((i for i, token in enumerate(new) if token in ends), None)
        if end is not None and end < len(path) - 1:
            # The answer ends inside the accepted path: what follows was never asked for.
            new, tested = new[: end + 1], end + 1
        if path == list(range(len(path))):
            cache.shorten(past + len(path))
        else:
            cache.keep(past, self._tensor([past + node for node in path]))
        if self.policy is not None:
            self.policy.verified(tested, min(len(path) - 1, len(new)))
        verified = self._now()

        # Features of the root and the accepted drafts; the token after each stands one ahead.
        kept = features[:, path] if len(path) < len(tree) else features
        if on_read is not None:
            on_read(kept)
        if isinstance(self.drafter, Baseline):
            self.drafter.read(tree, logits_NV)
        if self.drafter is not None and end is None:
            kept = kept.to(self.drafter.dtype)
            state = self.drafter.extend(state, kept, self._tensor(new)[None])
        done = Round(
            nodes=len(tree),
            depth=int(tree.depths_N[-1]),
            accepted=min(len(path) - 1, len(new)),
            tested=tested,
            produced=len(new),
            draft_s=drafted - begin + self._now() - verified,
            target_s=read - drafted,
            verify_s=verified - read,
        )
        return state, new, done

    def _draft(self, state: Any, root: int) -> Tree:
        root_1 = self._tensor([root])
        if isinstance(self.drafter, Baseline):
            return self.drafter.propose(state, root_1)
        if self.drafter is not None:
            assert self.policy is not None
            return self.drafter.propose(state, root_1, self.policy)
        zero_1 = torch.zeros_like(root_1)
        return Tree(root_1, zero_1 - 1, zero_1, torch.ones(1, device=root_1.device))

    def _read(self, tree: Tree, cache: GrowingCache, past: int) -> Features:
        """The target's features at every node, in one forward."""
        parents = tree.parents_N.tolist()
        mask, positions_BN = None, None
        if parents != list(range(-1, len(tree) - 1)):
            # A node stands right behind its parent: siblings share a position.
            positions_BN = past + tree.depths_N[None]
            mask = tree_mask(parents, past, self.target.dtype, self.target.device)
            if has_window(self.target.config):
                # Layers that only look a few positions back.
                at_K = torch.cat([torch.arange(past, device=mask.device), positions_BN[0]])
                config, dtype = self.target.config, self.target.dtype
                mask = additive(mask[0, 0] == 0, positions_BN[0], at_K, config, dtype)
        if self._shared is not None:
            return self._shared.verify(tree, attention_mask=mask, positions_BT=positions_BN)
        return self.target.forward(
            tree.tokens_N[None],
            attention_mask=mask,
            positions_BT=positions_BN,
            cache=cache,
            layers=self._layers,
        )

    def _law(self, logits_NV: Tensor) -> TargetLaw:
        """p(node), softmax made only where it is asked for."""

        def p(node: int) -> Tensor:
            return probabilities(logits_NV[node], temperature=self.temperature, top_p=self.top_p)

        return p

    def _tensor(self, ids: list[int]) -> Tensor:
        return torch.tensor(ids, device=self.target.device)

    def _now(self) -> float:
        """A clock reading after all queued work, so that a part's time is its own."""
        if self.target.device.type == "cuda":
            torch.cuda.synchronize(self.target.device)
        return time.perf_counter()

    def _check(self, prompt: list[int], max_new_tokens: int) -> None:
        limit = self.target.config.max_position_embeddings
        if not prompt or max_new_tokens < 1:
            raise ValueError(
                f"A prompt of {len(prompt)} tokens and max_new_tokens={max_new_tokens} were given; "
                "both must be at least 1, because the first token is drawn after the last one of "
                "the prompt."
            )
        if len(prompt) + max_new_tokens > limit:
            raise ValueError(
                f"A prompt of {len(prompt)} tokens and max_new_tokens={max_new_tokens} go beyond "
                f"the {limit} positions '{self.target.name}' was trained for; shorten the prompt "
                "(max_prompt_tokens) or the answer."
            )


def tree_mask(parents: list[int], past: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive mask `[1, 1, N, past + N]`: a node sees the whole past, its ancestors and itself.

    0 where visible and -inf elsewhere, added to the scores *before* the softmax.
    """
    rows: list[list[bool]] = []
    for node, parent in enumerate(parents):
        row = rows[parent].copy() if parent >= 0 else [False] * len(parents)
        row[node] = True
        rows.append(row)
    mask_NT = torch.zeros(len(parents), past + len(parents), dtype=dtype, device=device)
    hidden_NN = ~torch.tensor(rows, device=device)
    mask_NT[:, past:].masked_fill_(hidden_NN, float("-inf"))
    return mask_NT[None, None]
