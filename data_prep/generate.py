"""The target answers prompts, in batches.

Shape legend: B prompts of a batch, T positions, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from models.cache import GrowingCache
from models.sampling import draw, probabilities
from models.target import Target


@dataclass(frozen=True)
class Request:
    """A rendered prompt to be continued, and how. Temperature 0 is greedy."""

    id: str
    tokens: list[int]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """The new tokens; the end-of-answer token is their last one when `finish_reason` is eos.

    `engine` is the server that gave them ("vllm 0.32.0"; None: our own target), `logprobs` what it
    said of each token's log p, where it was asked.
    """

    id: str
    tokens: list[int]
    finish_reason: Literal["eos", "length"]
    engine: str | None = None
    logprobs: list[float] | None = None


class Generator:
    """Batched generation with the target.

    Batches are fixed by the requests alone (sorted by length, cut by `batch_tokens` and
    `max_batch`), so that a run that was interrupted and continued meets the same batches and gives
    the same answers. The random numbers of a sampled answer depend on its own seed only.
    `ids_D` are the token ids of `target.project`'s columns where it makes fewer than all (a drafter
    in the target's place).
    """

    def __init__(
        self,
        *,
        target: Target,
        batch_tokens: int = 32_768,
        max_batch: int = 96,
        ids_D: Tensor | None = None,
    ) -> None:
        self.target = target
        self.ids_D = ids_D
        self.batch_tokens = batch_tokens
        self.max_batch = max_batch

    def batches(self, requests: Sequence[Request]) -> list[list[Request]]:
        """Fixed batches, longest first: memory problems show at once, and ETAs are pessimistic."""
        groups: list[list[Request]] = []
        size = 0
        for request in sorted(requests, key=lambda r: (-_length(r), r.id, r.seed)):
            size = size or _length(request)
            full = groups and (
                len(groups[-1]) >= self.max_batch
                or (len(groups[-1]) + 1) * size > self.batch_tokens
            )
            if not groups or full:
                groups.append([])
                size = _length(request)
            groups[-1].append(request)
        return groups

    def answer(
        self, requests: Sequence[Request], *, on_batch: Callable[[list[Answer]], None]
    ) -> None:
        """Answer every request; `on_batch` receives the answers of each finished batch."""
        for batch in self.batches(requests):
            on_batch(self.answer_batch(batch))

    @torch.inference_mode()
    def answer_batch(self, batch: Sequence[Request]) -> list[Answer]:
        """Answer one batch. Rows that are finished leave it as soon as a quarter has."""
        target, device = self.target, self.target.device
        tokens_BT, visible_BT = pad_left(batch, target.eos_ids[0] if target.eos_ids else 0)
        tokens_BT, visible_BT = tokens_BT.to(device), visible_BT.to(device)
        noise = _Noise(batch)
        eos = torch.tensor(target.eos_ids, device=device)
        budget_B = torch.tensor([r.max_new_tokens for r in batch], device=device)
        rows_B = torch.arange(len(batch), device=device)  # request of each row still running
        made: list[list[int]] = [[] for _ in batch]
        ended = [False] * len(batch)

        cache = GrowingCache()
        positions_BT = (visible_BT.cumsum(-1) - 1).clamp(min=0)
        step = 0
        alive_B = torch.ones(len(batch), dtype=torch.bool, device=device)
        while True:
            features = target.forward(
                tokens_BT, attention_mask=visible_BT, positions_BT=positions_BT, cache=cache
            )
            logits_BV = target.project(features.final_BTd[:, -1])
            next_B = noise.choose(logits_BV, rows_B, step)
            if self.ids_D is not None:
                next_B = self.ids_D[next_B]
            step += 1
            eos_B = torch.isin(next_B, eos)
            for row, token, is_end, alive in zip(
                rows_B.tolist(), next_B.tolist(), eos_B.tolist(), alive_B.tolist(), strict=True
            ):
                if alive:
                    made[row].append(token)
                    ended[row] = is_end
            alive_B = alive_B & ~eos_B & (budget_B[rows_B] > step)
            running = int(alive_B.sum())
            if running == 0:
                break
            if running <= 0.75 * len(rows_B):
                keep = alive_B.nonzero().squeeze(-1)
                cache.select_rows(keep)
                rows_B, next_B, alive_B = rows_B[keep], next_B[keep], alive_B[keep]
                visible_BT, positions_BT = visible_BT[keep], positions_BT[keep]
            tokens_BT = next_B[:, None]
            positions_BT = positions_BT[:, -1:] + 1
            visible_BT = torch.cat([visible_BT, visible_BT.new_ones(len(rows_B), 1)], dim=1)
        return [Answer(r.id, made[i], "eos" if ended[i] else "length") for i, r in enumerate(batch)]


class _Noise:
    """Chooses the next token of each row: argmax, or inversion of the CDF at its own uniforms."""

    def __init__(self, batch: Sequence[Request]) -> None:
        self.batch = batch
        longest = max(r.max_new_tokens for r in batch)
        self.uniforms_BT = torch.stack(
            [torch.rand(longest, generator=torch.Generator().manual_seed(r.seed)) for r in batch]
        )
        self.sampled_B = torch.tensor([r.temperature > 0 for r in batch])

    def choose(self, logits_BV: Tensor, rows_B: Tensor, step: int) -> Tensor:
        rows = rows_B.cpu()
        sampled = self.sampled_B[rows].nonzero().squeeze(-1)
        greedy = len(sampled) < len(rows)
        chosen_B = logits_BV.argmax(-1) if greedy else torch.empty_like(rows_B)
        groups: dict[tuple[float, float], list[int]] = {}
        for i in sampled.tolist():
            request = self.batch[int(rows[i])]
            groups.setdefault((request.temperature, request.top_p), []).append(i)
        for (temperature, top_p), members in groups.items():
            p_NV = probabilities(logits_BV[members], temperature=temperature, top_p=top_p)
            chosen_B[members] = draw(p_NV, self.uniforms_BT[rows[members], step])
        return chosen_B


def _length(request: Request) -> int:
    return len(request.tokens) + request.max_new_tokens


def pad_left(batch: Sequence[Request], filler: int) -> tuple[Tensor, Tensor]:
    """Prompts `[B, T]` padded on the left, and 1 where a token is real."""
    longest = max(len(r.tokens) for r in batch)
    tokens_BT = torch.full((len(batch), longest), filler, dtype=torch.long)
    visible_BT = torch.zeros((len(batch), longest), dtype=torch.long)
    for i, request in enumerate(batch):
        tokens_BT[i, longest - len(request.tokens) :] = torch.tensor(request.tokens)
        visible_BT[i, longest - len(request.tokens) :] = 1
    return tokens_BT, visible_BT
