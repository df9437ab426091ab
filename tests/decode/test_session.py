import pytest
import torch

from decode.session import Decoder, tree_mask
from decode.tree.chain import Chain
from decode.tree.static import StaticTree
from decode.verifier.greedy import Greedy
from decode.verifier.sampling import Sampling
from models.drafter.base import Policy
from models.drafter.medusa import Medusa
from models.target import Target
from tests.decode.toy import PROMPTS, Echo, NoDraft, chi_square, echo, text_law
from tests.tiny import tiny_target

ACCURACY = [[0.4, 0.3, 0.2], [0.4, 0.2, 0.1], [0.3, 0.2, 0.1]]
POLICIES = {
    "chain": lambda: Chain(gamma=4),
    "static": lambda: StaticTree(nodes=14, accuracy_KR=ACCURACY),
    "none": NoDraft,
}


def plain_tokens(target: Target, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding without any cache: a whole forward for every token."""
    text = list(prompt)
    for _ in range(count):
        features = target.forward(torch.tensor([text])).final_BTd[:, -1]
        text.append(int(target.project(features).argmax()))
    return text[len(prompt) :]


def decoder(target: Target, drafter: Echo, policy: Policy) -> Decoder:
    return Decoder(target=target, drafter=drafter, verifier=Greedy(), policy=policy)


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_without_a_drafter_it_is_plain_greedy_decoding(target: Target, prompt: list[int]) -> None:
    plain = Decoder(target=target, drafter=None, verifier=Greedy(), policy=None)
    made = plain.generate(prompt, max_new_tokens=12, stop_at_eos=False)
    assert made.tokens == plain_tokens(target, prompt, 12)
    assert [(r.nodes, r.depth, r.accepted, r.produced) for r in made.rounds] == [(1, 0, 0, 1)] * 11


@pytest.mark.parametrize("verifier", [Greedy(), Sampling()], ids=["greedy", "sampling"])
@pytest.mark.parametrize("shape", list(POLICIES))
@pytest.mark.parametrize("noise", [0.0, 0.7, 50.0])
def test_greedy_tokens_do_not_depend_on_the_drafter(
    target: Target, shape: str, noise: float, verifier: Greedy | Sampling
) -> None:
    drafter = echo(target, noise=noise, draft_vocab_size=None)
    for prompt in PROMPTS:
        ours = Decoder(target=target, drafter=drafter, verifier=verifier, policy=POLICIES[shape]())
        made = ours.generate(prompt, max_new_tokens=20, stop_at_eos=False)
        assert made.tokens == plain_tokens(target, prompt, 20)


@pytest.mark.parametrize("shape", ["chain", "static"])
def test_the_drafter_is_given_the_features_of_a_fresh_forward(target: Target, shape: str) -> None:
    """Cache compaction, positions and mask at once: any slip changes these features."""
    drafter = echo(target, noise=0.7)
    made = decoder(target, drafter, POLICIES[shape]()).generate(
        PROMPTS[0], max_new_tokens=24, stop_at_eos=False
    )
    assert any(r.accepted > 0 for r in made.rounds), "the test needs accepted drafts"
    assert any(r.accepted < r.depth for r in made.rounds), "and rejected ones"
    state = drafter.last_state
    assert state is not None
    seen = state.tokens_1T
    text = PROMPTS[0] + made.tokens
    assert seen[0, : len(text)].tolist() == text[: seen.shape[1]]
    # Tokens run one ahead of features.
    fresh = target.forward(seen[:, :-1]).final_BTd
    assert state.features_1Td.shape == fresh.shape
    assert torch.allclose(state.features_1Td, fresh, atol=1e-4)


def test_a_perfect_chain_produces_gamma_plus_one_tokens_a_round(target: Target) -> None:
    made = decoder(target, echo(target), Chain(gamma=3)).generate(
        PROMPTS[0], max_new_tokens=13, stop_at_eos=False
    )
    # 1 token from the prompt's forward, then three rounds of 4.
    assert [(r.accepted, r.tested, r.produced) for r in made.rounds] == [(3, 3, 4)] * 3
    assert made.finish_reason == "length"


def test_the_first_rejection_counts_as_tested(target: Target) -> None:
    made = decoder(target, echo(target, noise=50.0), Chain(gamma=3)).generate(
        PROMPTS[0], max_new_tokens=8, stop_at_eos=False
    )
    for r in made.rounds:
        assert r.tested == min(3, r.accepted + 1)
        assert r.produced == r.accepted + 1
        assert r.nodes == 4


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7])
def test_max_new_tokens_is_kept_inside_an_accepted_path(target: Target, count: int) -> None:
    made = decoder(target, echo(target), Chain(gamma=4)).generate(
        PROMPTS[2], max_new_tokens=count, stop_at_eos=False
    )
    assert made.tokens == plain_tokens(target, PROMPTS[2], count)


@pytest.mark.parametrize("place", [0, 1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("shape", ["chain", "static"])
def test_an_end_token_inside_an_accepted_path_ends_the_answer(
    target: Target, monkeypatch: pytest.MonkeyPatch, place: int, shape: str
) -> None:
    whole = plain_tokens(target, PROMPTS[3], 10)
    place = whole.index(whole[place])  # its first occurrence
    monkeypatch.setattr(Target, "eos_ids", property(lambda self: (whole[place],)))
    made = decoder(target, echo(target), POLICIES[shape]()).generate(PROMPTS[3], max_new_tokens=10)
    assert made.tokens == whole[: place + 1]
    assert made.finish_reason == "eos"
    assert sum(r.produced for r in made.rounds) == len(made.tokens) - 1
    if made.rounds:
        last = made.rounds[-1]
        assert last.produced >= last.accepted
        assert last.tested >= last.accepted


def test_a_restricted_vocabulary_changes_acceptance_but_not_the_tokens(target: Target) -> None:
    drafter = echo(target, draft_vocab_size=target.vocab_size // 2)
    made = decoder(target, drafter, Chain(gamma=4)).generate(
        PROMPTS[1], max_new_tokens=24, stop_at_eos=False
    )
    assert made.tokens == plain_tokens(target, PROMPTS[1], 24)
    rejected = sum(r.accepted < r.depth for r in made.rounds)
    assert rejected > 0


def test_time_is_split_without_a_remainder(target: Target) -> None:
    made = decoder(target, echo(target), Chain(gamma=2)).generate(
        PROMPTS[0], max_new_tokens=16, stop_at_eos=False
    )
    assert set(made.seconds) == {"target", "draft", "verify"}
    parts = made.prefill_s + sum(made.seconds.values())
    assert parts <= made.total_s
    assert parts > 0.5 * made.total_s


def test_refusals(target: Target) -> None:
    plain = Decoder(target=target, drafter=None, verifier=Sampling(), policy=None)
    with pytest.raises(ValueError, match="0 tokens"):
        plain.generate([], max_new_tokens=4)
    with pytest.raises(ValueError, match="512 positions"):
        plain.generate([5] * 500, max_new_tokens=13)
    with pytest.raises(ValueError, match="verifier=sampling"):
        Decoder(target=target, drafter=None, verifier=Greedy(), policy=None, temperature=0.5)


def test_tree_mask_by_hand() -> None:
    #      0
    #     / \
    #    1   2      3 is a child of 2
    mask = tree_mask([-1, 0, 0, 2], past=2, dtype=torch.float32, device=torch.device("cpu"))
    assert mask.shape == (1, 1, 4, 6)
    seen = [
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 1, 0],
        [1, 1, 1, 0, 1, 1],
    ]
    assert (mask[0, 0] == 0).int().tolist() == seen
    assert bool(torch.isinf(mask[0, 0][mask[0, 0] != 0]).all())


@pytest.mark.parametrize("shape", ["chain", "static", "plain"])
def test_sampling_keeps_the_law_of_the_target(shape: str) -> None:
    """Counts of whole three-token texts against the exact law of a five-token target."""
    target = tiny_target(3, vocab_size=5)
    head = {"_target_": "models.head.own.OwnHead"}
    torch.manual_seed(0)
    drafter = Medusa(hidden_size=32, vocab_size=5, num_heads=2, draft_vocab_size=4, head=head).bind(
        target
    )
    drafter.init_from(target)
    drafter.eval()
    tree = [[0.4, 0.3, 0.2], [0.4, 0.3]]
    policies = {
        "chain": Chain(gamma=2, temperature=1.3, seed=1),
        "static": StaticTree(nodes=6, accuracy_KR=tree),
        "plain": None,
    }
    policy = policies[shape]
    temperature, runs, length = 1.3, 700, 3
    decoder = Decoder(
        target=target,
        drafter=drafter if policy is not None else None,
        verifier=Sampling(),
        policy=policy,
        temperature=temperature,
        seed=7,
    )
    law = text_law(target, [4, 1], length, temperature)
    counts = dict.fromkeys(law, 0)
    accepted = 0
    for _ in range(runs):
        made = decoder.generate([4, 1], max_new_tokens=length, stop_at_eos=False)
        counts[tuple(made.tokens)] += 1
        accepted += sum(r.accepted for r in made.rounds)
    statistic, bound = chi_square(list(counts.values()), [runs * p for p in law.values()])
    assert statistic < bound
    assert policy is None or accepted > runs // 4
    # The test can see a wrong law: the same counts against another temperature's.
    other = text_law(target, [4, 1], length, 2 * temperature)
    statistic, bound = chi_square(list(counts.values()), [runs * p for p in other.values()])
    assert statistic > bound
