"""Interleaved sampling: the drafter writes, the target replaces what it would hardly say itself.

Speculative knowledge distillation (arXiv 2410.11325): the drafter proposes a token y ~ q(. | so
far). It is kept when y is among the target's `top_k` most likely tokens; otherwise the target's own
sample y ~ p(. | so far) stands in its place. The text is near the drafter's own and never far off
the target's.

The drafter proposes `block` tokens at a time, so that the target judges a block in one forward.
What follows a replaced token was proposed after another prefix and is thrown away. Both caches
hold the same slots; a slot whose token was thrown away stays in them, invisible.

Shape legend: B rows still running, P tokens not yet read, G tokens of a block, S cache slots,
V vocabulary, d hidden size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from data_prep.generate import Answer, Request, pad_left
from models.cache import GrowingCache
from models.sampling import draw, probabilities
from models.target import Target


class Interleaver:
    """Answers batches of requests like `data_prep.generate.Generator`, by drafter and target.

    `drafter` is an object with the `forward` and `project` of a `Target`; `ids_D` are the target
    ids of its logits' columns, None where these are all of the target's vocabulary. Random numbers
    belong to (request seed, place in the answer), one for the drafter and one for the target, so
    that `block` does not change what is written. `proposed` and `kept` count tokens that were
    judged, over the life of the object.
    """

    def __init__(
        self,
        *,
        drafter: Any,
        target: Target,
        top_k: int,
        block: int,
        ids_D: Tensor | None = None,
    ) -> None:
        self.drafter, self.target, self.ids_D = drafter, target, ids_D
        self.top_k, self.block = top_k, block
        self.proposed = self.kept = 0

    @torch.inference_mode()
    def answer_batch(self, batch: Sequence[Request]) -> list[Answer]:
        """Answer one batch; all requests share temperature and top_p."""
        run = _Run(self, batch)
        while len(run.rows_B):
            run.round()
        self.proposed += run.proposed
        self.kept += run.kept
        eos = set(self.target.eos_ids)
        return [
            Answer(r.id, made, "eos" if made[-1] in eos else "length")
            for r, made in zip(batch, run.made, strict=True)
        ]


class _Run:
    """One batch on its way: what was written, what both models have read."""

    def __init__(self, parent: Interleaver, batch: Sequence[Request]) -> None:
        self.drafter, self.target, self.ids_D = parent.drafter, parent.target, parent.ids_D
        self.top_k, self.block = parent.top_k, parent.block
        self.temperature, self.top_p = batch[0].temperature, batch[0].top_p
        assert all((r.temperature, r.top_p) == (self.temperature, self.top_p) for r in batch)
        device = self.target.device
        # Not read yet: at first the whole prompt, later the last token written.
        unread_BP, visible_BP = pad_left(batch, min(self.target.eos_ids, default=0))
        self.unread_BP, self.visible_BP = unread_BP.to(device), visible_BP.to(device)
        self.positions_BP = (self.visible_BP.cumsum(-1) - 1).clamp(min=0)
        self.read_BS = self.visible_BP[:, :0]
        self.caches = GrowingCache(), GrowingCache()
        self.eos = torch.tensor(self.target.eos_ids, device=device)
        self.budget_B = torch.tensor([r.max_new_tokens for r in batch], device=device)
        self.rows_B = torch.arange(len(batch), device=device)
        self.written_B = torch.zeros_like(self.rows_B)
        self.alive_B = torch.ones_like(self.rows_B, dtype=torch.bool)
        self.made: list[list[int]] = [[] for _ in batch]
        self.proposed = self.kept = 0
        # Uniforms of the drafter and of the target, pair after pair: those of a place do not depend
        # on how many are made. A block may run over the last place.
        longest = max(r.max_new_tokens for r in batch) + self.block
        self.noise_BT2 = torch.stack(
            [torch.rand(longest, 2, generator=torch.Generator().manual_seed(r.seed)) for r in batch]
        ).to(device)

    def round(self) -> None:
        """Propose a block, judge it, write what stands."""
        G, P = self.block, self.unread_BP.shape[1]
        proposed_BG = self._propose()
        read_BM = torch.cat([self.unread_BP, proposed_BG[:, :-1]], dim=1)
        final_BGd = self._read_by_target(read_BM)[:, P - 1 :]
        # The state behind proposal j-1 (j = 0: behind the last unread token) judges proposal j.
        logits_BGV = self.target.project(final_BGd)
        allowed_BGk = logits_BGV.topk(min(self.top_k, logits_BGV.shape[-1]), dim=-1).indices
        good_BG = (allowed_BGk == proposed_BG[..., None]).any(-1)
        kept_B = good_BG.long().cumprod(-1).sum(-1)
        failed_B = kept_B.clamp(max=G - 1)
        rows = torch.arange(len(kept_B), device=kept_B.device)
        own_B = self._draw(1, logits_BGV[rows, failed_B], failed_B)
        place_1G = torch.arange(G, device=kept_B.device)[None]
        text_BG = torch.where(place_1G == kept_B[:, None], own_B[:, None], proposed_BG)
        # kept tokens and the target's own one; a block kept as a whole has no room for that.
        length_B = (kept_B + 1).clamp(max=G)
        self._write(text_BG, length_B, kept_B)
        # Of the slots just filled, the unread tokens and all written ones but the last are text.
        stands_BG = (place_1G[:, : G - 1] < (length_B - 1)[:, None]).to(self.visible_BP)
        self.read_BS = torch.cat([self.read_BS, self.visible_BP, stands_BG], dim=1)
        self.unread_BP = text_BG.gather(1, length_B[:, None] - 1)
        self.positions_BP = self.positions_BP[:, -1:] + length_B[:, None]
        self.visible_BP = torch.ones_like(self.unread_BP)
        self._dismiss()

    def _propose(self) -> Tensor:
        """`block` tokens of the drafter, one after the other, `[B, G]`."""
        tokens_BM, positions_BM = self.unread_BP, self.positions_BP
        visible_BS = torch.cat([self.read_BS, self.visible_BP], dim=1)
        proposed: list[Tensor] = []
        while True:
            features = self.drafter.forward(
                tokens_BM,
                attention_mask=visible_BS,
                positions_BT=positions_BM,
                cache=self.caches[0],
            )
            logits_BV = self.drafter.project(features.final_BTd[:, -1])
            place_B = torch.full_like(self.rows_B, len(proposed))
            drawn_B = self._draw(0, logits_BV, place_B)
            proposed.append(drawn_B if self.ids_D is None else self.ids_D[drawn_B])
            if len(proposed) == self.block:
                return torch.stack(proposed, dim=1)
            tokens_BM, positions_BM = proposed[-1][:, None], positions_BM[:, -1:] + 1
            visible_BS = torch.cat([visible_BS, torch.ones_like(tokens_BM)], dim=1)

    def _read_by_target(self, tokens_BM: Tensor) -> Tensor:
        """The target's final features behind each of these tokens, in its own dtype."""
        ahead_1G = torch.arange(1, self.block, device=tokens_BM.device)[None]
        positions_BM = torch.cat([self.positions_BP, self.positions_BP[:, -1:] + ahead_1G], dim=1)
        drafted_BG = torch.ones_like(tokens_BM[:, : self.block - 1])
        visible_BS = torch.cat([self.read_BS, self.visible_BP, drafted_BG], dim=1)
        with torch.autocast(tokens_BM.device.type, enabled=False):
            return self.target.forward(
                tokens_BM,
                attention_mask=visible_BS,
                positions_BT=positions_BM,
                cache=self.caches[1],
            ).final_BTd

    def _draw(self, who: int, logits_BV: Tensor, place_B: Tensor) -> Tensor:
        """Sample of the drafter (0) or the target (1) for a place of the block in each row."""
        p_BV = probabilities(logits_BV, temperature=self.temperature, top_p=self.top_p)
        at_B = (self.written_B + place_B).clamp(max=self.noise_BT2.shape[1] - 1)
        return draw(p_BV, self.noise_BT2[self.rows_B, at_B, who])

    def _write(self, text_BG: Tensor, length_B: Tensor, kept_B: Tensor) -> None:
        """Append each living row's text up to its first end-of-answer token or its budget."""
        room_B = torch.minimum(length_B, self.budget_B[self.rows_B] - self.written_B)
        ends_BG = torch.isin(text_BG, self.eos)
        place_1G = torch.arange(self.block, device=text_BG.device)[None]
        first_B = torch.where(ends_BG, place_1G, self.block).amin(-1)
        take_B = torch.minimum(room_B, first_B + 1)
        for row, alive, take, kept, text in zip(
            self.rows_B.tolist(),
            self.alive_B.tolist(),
            take_B.tolist(),
            kept_B.tolist(),
            text_BG.tolist(),
            strict=True,
        ):
            if alive:
                self.made[row] += text[:take]
                self.proposed += take
                self.kept += min(kept, take)
        self.written_B = self.written_B + length_B
        full_B = self.written_B >= self.budget_B[self.rows_B]
        self.alive_B = self.alive_B & ~full_B & (first_B >= room_B)

    def _dismiss(self) -> None:
        """Rows that are finished leave as soon as a quarter has."""
        running = int(self.alive_B.sum())
        if running > 0.75 * len(self.rows_B):
            return
        keep = self.alive_B.nonzero().squeeze(-1)
        for name in ("rows_B", "written_B", "alive_B", "unread_BP", "positions_BP"):
            setattr(self, name, getattr(self, name)[keep])
        self.visible_BP, self.read_BS = self.visible_BP[keep], self.read_BS[keep]
        if running:
            for cache in self.caches:
                cache.select_rows(keep)
