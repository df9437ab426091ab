"""Is what a server serves our target? Its own log-probabilities against ours.

Shape legend: T tokens of an answer, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data_prep.generate import Answer, Request
from models.target import Target

PROBE_TOKENS = 32


@dataclass(frozen=True)
class Proof:
    """Over `tokens` greedy answer tokens, in nats: `off` is the mean |log p(server) - log p(ours)|
    of the token (None: the server gave none), `below` the mean of how much less likely than ours is
    the token that the server held for the likeliest."""

    tokens: int
    off: float | None
    below: float

    def __str__(self) -> str:
        if self.off is None:
            return f"{self.below:.2g} nats below the target's likeliest, on {self.tokens} tokens"
        return f"log-probabilities {self.off:.2g} from the target's, on {self.tokens} tokens"


def probes(requests: Sequence[Request], count: int) -> list[Request]:
    """A few of the requests from all over, greedy and short."""
    count = min(count, len(requests))
    chosen = [requests[i * len(requests) // count] for i in range(count)]
    return [
        replace(r, temperature=0.0, top_p=1.0, max_new_tokens=min(PROBE_TOKENS, r.max_new_tokens))
        for r in chosen
    ]


class Judge:
    """Compares; what our target says of an answer is computed once."""

    def __init__(self, target: Target, *, tolerance: float) -> None:
        self.target, self.tolerance = target, tolerance
        self._known: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def judge(self, asked: Sequence[Request], answers: Sequence[Answer], url: str) -> Proof:
        """Raises ValueError when the server's model is not the target."""
        off: list[Tensor] = []
        below: list[Tensor] = []
        for request, answer in zip(asked, answers, strict=True):
            own_T, best_T = self._ours(request.tokens, answer.tokens)
            below.append(best_T - own_T)
            if answer.logprobs is not None:
                off.append((torch.tensor(answer.logprobs) - own_T).abs())
        gap = torch.cat(below)
        far = float(torch.cat(off).mean()) if off else None
        proof = Proof(len(gap), far, float(gap.mean()))
        if max(proof.below, proof.off or 0.0) > self.tolerance:
            raise ValueError(
                f"The server at {url} does not serve the target '{self.target.name}': {proof}, "
                f"expected at most {self.tolerance:g} (server.tolerance) because a drafter learns "
                "what this target says. Serve the same weights (an adapter merged, not quantised "
                "otherwise), or raise the tolerance if precision is all that differs."
            )
        return proof

    @torch.inference_mode()
    def _ours(self, prompt: list[int], answer: list[int]) -> tuple[Tensor, Tensor]:
        """log p of the answer's tokens and of our likeliest, `[T]` each.

        The state at the last prompt token predicts the first token of the answer.
        """
        key = (len(prompt), *prompt, *answer)
        if key not in self._known:
            tokens = torch.tensor([prompt + answer], device=self.target.device)
            final_Td = self.target.forward(tokens).final_BTd[0, len(prompt) - 1 : -1]
            logp_TV = self.target.project(final_Td).float().log_softmax(-1)
            own_T = logp_TV.gather(-1, tokens[0, len(prompt) :, None])[:, 0]
            self._known[key] = own_T.cpu(), logp_TV.max(-1).values.cpu()
        return self._known[key]
