"""Drafters trained in seconds on the target's own answers to a few prompts."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from data_prep.prompts import Prompt
from models.drafter.base import Drafter
from models.target import Target

TEXTS = ("The capital of France is", "def fib(n):\n    if n < 2:\n", "1 2 3 4 5 1 2 3 4 5 1 2")


def prompts(target: Target) -> list[Prompt]:
    """Three plain texts to continue."""
    return [Prompt(str(i), target.tokenizer(t)["input_ids"], t) for i, t in enumerate(TEXTS)]


@torch.no_grad()
def answers(target: Target, given: Sequence[Prompt], length: int) -> list[Tensor]:
    """Prompt and greedy answer, `[T]`; nothing ends an answer."""
    found = []
    for prompt in given:
        ids = torch.tensor([prompt.tokens], device=target.device)
        made = target.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=length,
            max_new_tokens=length,
            pad_token_id=0,
        )
        found.append(made[0])
    return found


def frequent(texts: Sequence[Tensor], size: int) -> Tensor:
    """A draft vocabulary with the ids of these texts in it, and the lowest others."""
    used = torch.cat(list(texts)).unique()
    others = torch.arange(size + len(used))
    return torch.cat([used, others[~torch.isin(others, used)]])[:size].sort().values


def train(
    drafter: Drafter, target: Target, texts: Sequence[Tensor], *, steps: int, lr: float = 1e-3
) -> None:
    """Cross-entropy of every depth (and the next feature, where a family predicts it)."""
    ids_D = drafter.draft_ids_D
    features = [target.forward(t[None], layers=drafter.feature_layers) for t in texts]
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=lr, weight_decay=0.0)
    drafter.train()
    for _ in range(steps):
        optimizer.zero_grad()
        for text_T, seen in zip(texts, features, strict=True):
            total = torch.zeros(())
            for depth in drafter.unroll(seen, text_T[None]):
                rows = len(text_T) - depth.shift - 1
                labels = text_T[depth.shift + 1 :]
                if ids_D is not None:
                    labels = torch.searchsorted(ids_D, labels)
                loss = F.cross_entropy(depth.head(depth.states_BNd[0, :rows]), labels)
                if depth.feature_BNd is not None:
                    truth = seen.final_BTd[0, depth.shift : depth.shift + rows]
                    loss = loss + F.smooth_l1_loss(depth.feature_BNd[0, :rows], truth)
                total = total + loss
            total.backward()
        torch.nn.utils.clip_grad_norm_(drafter.parameters(), 1.0)
        optimizer.step()
    drafter.eval()
