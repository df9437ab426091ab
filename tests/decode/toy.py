"""Stand-ins for decoding tests: an enumerator of chance, and a drafter that is good on purpose.

Shape legend: T positions, N tree nodes, d hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeVar

import torch
from torch import Tensor

from models.drafter.base import Children, Depth, Drafter, Frontier, Policy
from models.head import Head
from models.head.frozen import FrozenHead
from models.target import Features, Target
from models.vocab import choose_vocab

T = TypeVar("T")
PROMPTS = [[5, 9, 17, 30], [40], [8, 8, 8, 100, 101, 102, 103], [3, 200, 7]]


def outcomes(experiment: Callable[["Scripted"], T]) -> Iterator[tuple[T, float]]:
    """Every result a randomised experiment can have, with its exact probability.

    The experiment is run again for every branch: a script fixes its first choices, and the choices
    beyond the script are noted so that their alternatives are visited later.
    """
    scripts: list[list[int]] = [[]]
    while scripts:
        chance = Scripted(scripts.pop())
        result = experiment(chance)
        scripts += chance.alternatives
        yield result, chance.probability


class Scripted:
    """A `Chance` that follows a script of option numbers, then takes the first possible option."""

    def __init__(self, script: list[int]) -> None:
        self.script = script
        self.taken: list[int] = []
        self.alternatives: list[list[int]] = []
        self.probability = 1.0

    def coin(self, probability: float) -> bool:
        accept = min(1.0, probability)
        return self._choose([accept, 1.0 - accept]) == 0

    def draw(self, p_V: Tensor) -> int:
        return self._choose(p_V.tolist())

    def draws(self, p_NV: Tensor, count: int) -> Tensor:
        """An empty row has no draw to make; its id means nothing."""
        rows = [[self.draw(p_V) if p_V.any() else 0 for _ in range(count)] for p_V in p_NV]
        return torch.tensor(rows)

    def _choose(self, options: Sequence[float]) -> int:
        possible = [i for i, p in enumerate(options) if p > 0.0]
        if len(self.taken) < len(self.script):
            option = self.script[len(self.taken)]
        else:
            option = possible[0]
            self.alternatives += [[*self.taken, other] for other in possible[1:]]
        self.taken.append(option)
        self.probability *= options[option]
        return option


def tables(seed: int, vocab: int, length: int, sharpness: float = 1.2) -> dict[tuple, Tensor]:
    """A random distribution in double precision after every prefix up to `length` tokens."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for n in range(length + 1):
        for prefix in product(range(vocab), repeat=n):
            logits_V = torch.randn(vocab, generator=generator, dtype=torch.double) * sharpness
            found[prefix] = logits_V.softmax(-1)
    return found


def law_error(
    p: dict[tuple, Tensor], vocab: int, length: int, round_: Callable[[Scripted], tuple]
) -> float:
    """Largest difference between the law of `length` tokens and the product of p.

    `round_` returns the tokens one round produced; the rest of the text is completed from p.
    """
    return results_error(p, vocab, length, outcomes(round_))


def results_error(
    p: dict[tuple, Tensor], vocab: int, length: int, results: Iterable[tuple[tuple, float]]
) -> float:
    """The same from the texts rounds produced, each with its probability."""
    law = dict.fromkeys(product(range(vocab), repeat=length), 0.0)
    total = 0.0
    for text, probability in results:
        total += probability
        start = text[:length]
        for rest in product(range(vocab), repeat=length - len(start)):
            weight, whole = probability, start
            for token in rest:
                weight *= float(p[whole][token])
                whole = (*whole, token)
            law[whole] += weight
    assert abs(total - 1.0) < 1e-12, "the enumeration missed a branch"
    return max(abs(found - joint(p, text)) for text, found in law.items())


def joint(p: dict[tuple, Tensor], text: tuple) -> float:
    """The product of p along a text."""
    weight = 1.0
    for i, token in enumerate(text):
        weight *= float(p[text[:i]][token])
    return weight


@dataclass(frozen=True)
class EchoState:
    """All known tokens, and the features of all verified positions."""

    tokens_1T: Tensor
    features_1Td: Tensor


class Echo(Drafter):
    """Drafts with the target itself, disturbed by noise: right often, wrong often enough.

    With noise 0 every first draft is right. Its first exit of two has twice the noise. It keeps the
    features it was given, so that a test can compare them with those of a fresh forward. Slow; only
    for tests.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        vocab_size: int,
        noise: float = 0.0,
        draft_vocab_size: int | None = None,
    ) -> None:
        super().__init__(
            hidden_size=hidden_size, vocab_size=vocab_size, draft_vocab_size=draft_vocab_size
        )
        self.noise = noise
        self.frozen = FrozenHead(hidden_size=hidden_size, vocab_size=vocab_size)
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.last_state: EchoState | None = None
        self.exit_costs = (0.1, 0.3)

    @property
    def num_depths(self) -> int:
        return 1

    @property
    def max_depth(self) -> None:
        return None

    def head(self, depth: int) -> Head:
        return self.frozen

    def unroll(self, features: Features, tokens_BT: Tensor) -> Iterator[Depth]:
        yield Depth(features.final_BTd, self.frozen, shift=0)

    def start(self, features: Features, tokens_1T: Tensor) -> EchoState:
        assert tokens_1T.shape[1] == features.final_BTd.shape[1] + 1
        self.last_state = EchoState(tokens_1T, features.final_BTd)
        return self.last_state

    def extend(self, state: EchoState, features: Features, tokens_1N: Tensor) -> EchoState:
        assert tokens_1N.shape[1] == features.final_BTd.shape[1]
        self.last_state = EchoState(
            torch.cat([state.tokens_1T, tokens_1N], dim=1),
            torch.cat([state.features_1Td, features.final_BTd], dim=1),
        )
        return self.last_state

    def step(self, state: Any, depth: int, frontier: Frontier) -> tuple[Any, Tensor]:
        """At depth 0 the state is an EchoState that ends with the root; below, rows of text."""
        if depth == 0:
            texts_NT = state.tokens_1T
        else:
            texts_NT = torch.cat([state[frontier.parents_N], frontier.tokens_N[:, None]], dim=1)
        states_Nd = self.target.forward(texts_NT).final_BTd[:, -1]
        for row, text in enumerate(texts_NT.tolist()):
            generator = torch.Generator().manual_seed(hash(tuple(text)) % 2**31)
            noise = self.noise * (2.0 if self.leave_at == 0 else 1.0)
            states_Nd[row] += noise * torch.randn(self.hidden_size, generator=generator)
        return texts_NT, states_Nd


def echo(target: Target, *, noise: float = 0.0, draft_vocab_size: int | None = None) -> Echo:
    """An Echo bound to a target, drafting over the lowest ids when restricted."""
    drafter = Echo(
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        noise=noise,
        draft_vocab_size=draft_vocab_size,
    )
    if draft_vocab_size is not None:
        counts_V = torch.zeros(target.vocab_size)
        drafter.set_vocab(choose_vocab(counts_V, draft_vocab_size)[0])
    drafter.bind(target)
    return drafter


class NoDraft(Policy):
    """A policy that never drafts."""

    name = "none"

    def grow(self, depth: int, frontier: Frontier, logits_ND: Tensor, drafter: Drafter) -> None:
        return None


class Fixed(Policy):
    """A policy that hands out given children, depth by depth."""

    name = "fixed"

    def __init__(self, levels: list[Children]) -> None:
        self.levels = levels

    def grow(
        self, depth: int, frontier: Frontier, logits_ND: Tensor, drafter: Drafter
    ) -> Children | None:
        return self.levels[depth] if depth < len(self.levels) else None


def chi_square(counts: Sequence[int], expected: Sequence[float]) -> tuple[float, float]:
    """The statistic and its bound at alpha = 1e-4, cells with fewer than 5 expected pooled.

    The bound is Wilson and Hilferty's cube approximation of the chi-square quantile (z = 3.719).
    """
    pooled_count, pooled_expected, statistic, cells = 0.0, 0.0, 0.0, 0
    for count, mean in zip(counts, expected, strict=True):
        if mean < 5.0:
            pooled_count += count
            pooled_expected += mean
        else:
            statistic += (count - mean) ** 2 / mean
            cells += 1
    if pooled_expected > 0.0:
        statistic += (pooled_count - pooled_expected) ** 2 / max(pooled_expected, 1e-9)
        cells += 1
    free = cells - 1
    bound = free * (1 - 2 / (9 * free) + 3.719 * (2 / (9 * free)) ** 0.5) ** 3
    return statistic, bound


@torch.inference_mode()
def text_law(
    target: Target, prompt: list[int], length: int, temperature: float
) -> dict[tuple[int, ...], float]:
    """The exact probability of every continuation of `length` tokens."""
    vocab = target.vocab_size
    law: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        texts = list(law)
        tokens_BT = torch.tensor([[*prompt, *text] for text in texts])
        logits_BV = target.project(target.forward(tokens_BT).final_BTd[:, -1])
        p_BV = (logits_BV.double() / temperature).softmax(-1).tolist()
        law = {
            (*text, token): law[text] * p_BV[i][token]
            for i, text in enumerate(texts)
            for token in range(vocab)
        }
    return law
