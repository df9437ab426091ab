"""Drafter and target in turns."""

import pytest
import torch
from torch import Tensor

from data_prep.generate import Answer, Generator, Request
from models.sampling import probabilities
from models.target import Target
from tests.train.toy_lm import ToyLm, chi_square_z
from train.interleaved import Interleaver


def requests(
    count: int, *, new: int = 20, temperature: float = 1.0, top_p: float = 1.0
) -> list[Request]:
    g = torch.Generator().manual_seed(5)
    return [
        Request(
            id=str(i),
            tokens=torch.randint(3, 300, (1 + int(torch.randint(9, (), generator=g)),)).tolist(),
            max_new_tokens=new - i % 4,
            temperature=temperature,
            top_p=top_p,
            seed=100 + i,
        )
        for i in range(count)
    ]


def next_logits(model: Target, tokens: list[int]) -> Tensor:
    return model.project(model.forward(torch.tensor([tokens])).final_BTd[0, -1])


def other(target: Target) -> ToyLm:
    return ToyLm(target=target, layers=2).eval()


def answer(target: Target, drafter: ToyLm, batch: list[Request], k: int, block: int):
    made = Interleaver(drafter=drafter.as_generator_target(), target=target, top_k=k, block=block)
    return made, made.answer_batch(batch)


def one_by_one(target: Target, drafter: ToyLm, request: Request, k: int) -> tuple[Answer, int]:
    """The definition: no cache, no batch, no block."""
    speaker = drafter.as_generator_target()
    noise = torch.rand(request.max_new_tokens, 2, generator=_seeded(request.seed))
    made, kept = [], 0
    for place in range(request.max_new_tokens):
        both = []
        so_far = request.tokens + made
        q = speaker.project(speaker.forward(torch.tensor([so_far])).final_BTd[0, -1])
        p = next_logits(target, so_far)
        for who, logits in enumerate((q, p)):
            mass = probabilities(
                logits[None], temperature=request.temperature, top_p=request.top_p
            )[0].double()
            point = noise[place, who].double() * mass.cumsum(0)[-1]
            both.append(int((mass.cumsum(0) <= point).sum()))
        good = both[0] in p.topk(k).indices.tolist()
        kept += good
        made.append(both[0] if good else both[1])
        if made[-1] in target.eos_ids:
            return Answer(request.id, made, "eos"), kept
    return Answer(request.id, made, "length"), kept


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.0, 1.0), (0.8, 0.9)])
def test_batch_and_block_write_what_the_definition_writes(
    target: Target, temperature: float, top_p: float
) -> None:
    drafter = other(target)
    batch = requests(8, temperature=temperature, top_p=top_p)
    wanted = [one_by_one(target, drafter, r, 25) for r in batch]
    for block in (1, 2, 4, 7):
        interleaver, answers = answer(target, drafter, batch, 25, block)
        assert answers == [a for a, _ in wanted]
        assert interleaver.kept == sum(kept for _, kept in wanted)
        assert interleaver.proposed == sum(len(a.tokens) for a, _ in wanted)
        assert 0.2 < interleaver.kept / interleaver.proposed < 0.99


def test_answers_end_at_the_end_token(target: Target) -> None:
    batch = requests(120, new=30)
    _, answers = answer(target, other(target), batch, 25, 4)
    ended = [a for a in answers if a.finish_reason == "eos"]
    assert 3 < len(ended) < 117
    for request, a in zip(batch, answers, strict=True):
        assert not set(a.tokens[:-1]) & set(target.eos_ids)
        assert (a.tokens[-1] in target.eos_ids) == (a.finish_reason == "eos")
        assert a in ended or len(a.tokens) == request.max_new_tokens


def test_no_token_outside_the_targets_best_is_kept(target: Target) -> None:
    """Greedy target: each token is among its best k; the drafter's choices are all among them."""
    drafter, k = other(target), 3
    batch = requests(8, temperature=0.0)
    _, answers = answer(target, drafter, batch, k, 4)
    for r, a in zip(batch, answers, strict=True):
        for i, token in enumerate(a.tokens):
            assert token in next_logits(target, r.tokens + a.tokens[:i]).topk(k).indices.tolist()


def test_one_allowed_token_is_greedy_decoding_of_the_target(target: Target) -> None:
    batch = requests(8, temperature=0.0)
    _, answers = answer(target, other(target), batch, 1, 3)
    assert answers == Generator(target=target).answer_batch(batch)


def test_all_allowed_is_sampling_from_the_drafter(target: Target) -> None:
    drafter = other(target)
    batch = requests(8)
    interleaver, answers = answer(target, drafter, batch, target.vocab_size, 3)
    assert interleaver.kept == interleaver.proposed
    assert answers == [one_by_one(target, drafter, r, target.vocab_size)[0] for r in batch]


def test_replacements_follow_the_target(target: Target) -> None:
    """First token: q(y) for the allowed y, plus the rejected mass times p; 4000 draws."""
    drafter, k, draws = other(target), 4, 4000
    prompt = [7, 20, 31]
    batch = [
        Request(id=str(i), tokens=prompt, max_new_tokens=1, temperature=1.0, seed=i)
        for i in range(draws)
    ]
    _, answers = answer(target, drafter, batch, k, 4)
    p = next_logits(target, prompt).softmax(-1)
    speaker = drafter.as_generator_target()
    q = speaker.project(speaker.forward(torch.tensor([prompt])).final_BTd[0, -1]).softmax(-1)
    allowed = torch.zeros_like(p)
    allowed[p.topk(k).indices] = 1.0
    law = q * allowed + (q * (1 - allowed)).sum() * p
    assert float(law.sum()) == pytest.approx(1.0, abs=1e-5)
    assert chi_square_z([a.tokens[0] for a in answers], law) < 4.0
