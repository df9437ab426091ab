"""A fixed exit, and drafters that have none."""

import pytest
import torch

from decode.session import Decoder
from decode.stop.del_exit import DelExit
from decode.stop.exit import Exit
from decode.tree.chain import Chain
from decode.verifier.sampling import Sampling
from models.target import Target
from tests.models.drafter.test_sorted_lm import sorted_lm


@pytest.mark.parametrize("place", [0, 1, 2])
def test_every_draft_of_the_decoder_comes_from_the_exit(target: Target, place: int) -> None:
    drafter = sorted_lm(target, thresholds=[0.0, 0.0])  # which would always leave at the first
    policy = Chain(gamma=3, stop=Exit(exit=place, exit_costs=drafter.exit_costs))
    decoder = Decoder(target=target, drafter=drafter, verifier=Sampling(), policy=policy)
    made = decoder.generate([5, 9, 17, 30], max_new_tokens=12, stop_at_eos=False)
    expected = [0, 0, 0]
    expected[place] = sum(r.depth for r in made.rounds)
    assert drafter.exits_taken == expected
    # Another policy is not bound to what this one chose.
    free = Decoder(target=target, drafter=drafter, verifier=Sampling(), policy=Chain(gamma=1))
    again = free.generate([5, 9, 17, 30], max_new_tokens=12, stop_at_eos=False)
    assert again.tokens == made.tokens
    expected[0] += len(again.rounds)
    assert drafter.exits_taken == expected


def test_a_draft_costs_the_weights_it_reads(target: Target) -> None:
    """Layers up to the exit and the head, over all weights of the target."""
    drafter = sorted_lm(target, draft_vocab_size=64)
    model = target.model
    layer = sum(p.numel() for p in model.get_decoder().layers[0].parameters())
    head, whole = 64 * target.hidden_size, sum(p.numel() for p in model.parameters())
    wanted = [(n * layer + head) / whole for n in (1, 2, 4)]
    assert drafter.exit_costs == pytest.approx(wanted)
    # With one exit there is nothing to choose, and a tuning asks for none.
    assert sorted_lm(target, exits=[4]).exit_costs == ()


def test_a_drafter_with_one_way_of_drafting_is_refused() -> None:
    with pytest.raises(ValueError, match="stop=exit chooses among the exits"):
        Exit(exit=0, exit_costs=())
    with pytest.raises(ValueError, match="stop=del_exit chooses among the exits"):
        DelExit(exit_costs=(0.1,))
    with pytest.raises(ValueError, match="give 0 to 1"):
        Exit(exit=2, exit_costs=(0.1, 0.2))


def test_drafts_of_an_exit_are_its_training_states(target: Target) -> None:
    """The best token of every exit's state in `unroll`."""
    drafter = sorted_lm(target)
    tokens_BT = torch.tensor([[5, 9, 17, 30, 8, 100, 41]])
    features = target.forward(tokens_BT)
    depths = list(drafter.unroll(features, tokens_BT))
    state = drafter.start(features[:, :6], tokens_BT)
    for place, depth in enumerate(depths):
        policy = Chain(gamma=1, stop=Exit(exit=place, exit_costs=drafter.exit_costs))
        drafted = drafter.propose(state, tokens_BT[0, -1:], policy).tokens_N[1]
        assert int(drafted) == int(depth.head(depth.states_BNd[0, -1]).argmax())
