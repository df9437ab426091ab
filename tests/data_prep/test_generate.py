"""Batched generation against one prompt at a time."""

import random

import pytest
import torch

from data_prep.generate import Answer, Generator, Request
from models.target import Target


def _requests(target: Target, count: int, **how: float | int) -> list[Request]:
    rng = random.Random(0)
    return [
        Request(
            id=f"r{i}",
            tokens=[rng.randrange(3, target.vocab_size) for _ in range(rng.randrange(1, 30))],
            max_new_tokens=rng.randrange(1, 40),
            seed=i,
            **how,  # type: ignore[arg-type]
        )
        for i in range(count)
    ]


def _answer(generator: Generator, requests: list[Request]) -> dict[str, Answer]:
    answers: dict[str, Answer] = {}
    generator.answer(requests, on_batch=lambda batch: answers.update({a.id: a for a in batch}))
    return answers


def test_greedy_equals_transformers_generate(target: Target) -> None:
    requests = _requests(target, 24)
    answers = _answer(Generator(target=target, max_batch=8), requests)
    for request in requests:
        ids = torch.tensor([request.tokens])
        out = target.model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=request.max_new_tokens,
            do_sample=False,
        )
        assert answers[request.id].tokens == out[0, ids.shape[1] :].tolist()


def test_sampled_answers_do_not_depend_on_the_batch(target: Target) -> None:
    requests = _requests(target, 12, temperature=1.0, top_p=0.9)
    together = _answer(Generator(target=target, max_batch=12), requests)
    alone = _answer(Generator(target=target, max_batch=1), requests)
    assert together == alone
    assert len({tuple(a.tokens) for a in together.values()}) > 6


def test_first_token_follows_the_target_distribution(target: Target) -> None:
    prompt = [5, 6, 7]
    logits = target.project(target.forward(torch.tensor([prompt])).final_BTd[0, -1])
    p = (logits / 0.7).softmax(-1)
    requests = [
        Request(f"s{i}", prompt, max_new_tokens=1, temperature=0.7, seed=i) for i in range(4000)
    ]
    answers = _answer(Generator(target=target, max_batch=500), requests)
    counts = torch.bincount(torch.tensor([a.tokens[0] for a in answers.values()]), minlength=len(p))
    common = p * 4000 >= 5
    expected = torch.cat([p[common], p[~common].sum()[None]]) * 4000
    seen = torch.cat([counts[common], counts[~common].sum()[None]])
    chi_square = float(((seen - expected) ** 2 / expected).sum())
    freedom = int(common.sum())
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


def test_end_of_answer_is_kept_and_reported(target: Target) -> None:
    answers = _answer(Generator(target=target), _requests(target, 40, temperature=1.5))
    reasons = {a.finish_reason for a in answers.values()}
    assert reasons == {"eos", "length"}
    for answer in answers.values():
        inside = set(answer.tokens[:-1]) & set(target.eos_ids)
        assert not inside
        assert (answer.tokens[-1] in target.eos_ids) == (answer.finish_reason == "eos")


@pytest.mark.parametrize(("max_batch", "batch_tokens"), [(4, 10_000), (100, 150), (1, 1)])
def test_batches_hold_every_request_once_within_the_budget(
    target: Target, max_batch: int, batch_tokens: int
) -> None:
    requests = _requests(target, 30)
    generator = Generator(target=target, max_batch=max_batch, batch_tokens=batch_tokens)
    batches = generator.batches(requests)
    assert sorted(r.id for b in batches for r in b) == sorted(r.id for r in requests)
    for batch in batches:
        longest = max(len(r.tokens) + r.max_new_tokens for r in batch)
        assert len(batch) <= max_batch
        assert len(batch) == 1 or longest * len(batch) <= batch_tokens
    assert batches == generator.batches(list(reversed(requests)))
