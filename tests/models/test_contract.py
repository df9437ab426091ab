"""The drafter contract, for every family in models/drafter: a new file there is covered on arrival.

Each family is built from its conf/drafter/<family>.yaml for a tiny target. VARIANTS adds settings
that change the code path; a family without an entry is tested as configured and with a reduced
draft vocabulary.

Shape legend: B sequences, T positions, N rows, d hidden size, V vocabulary, D draft vocabulary.
"""

import copy
import importlib
import inspect
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from torch import Tensor
from torch.nn import functional as F

import models.drafter
from conf.check import build
from decode.session import Decoder
from decode.tree.chain import Chain
from decode.tree.static import StaticTree
from decode.verifier.greedy import Greedy
from decode.verifier.sampling import Sampling
from models.drafter.base import Depth, Drafter, Frontier, served_depth
from models.drafter.load import load_drafter
from models.target import Features, Target
from tests.decode.toy import chi_square, text_law
from tests.tiny import tiny_target

NOT_FAMILIES = {"__init__", "base", "blocks", "load"}
OWN, TIED = "models.head.own.OwnHead", "models.head.tied.TiedHead"
FROZEN = "models.head.frozen.FrozenHead"
LOW_RANK = {"_target_": "models.head.low_rank.LowRankHead", "rank": 16}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "medusa": [{"num_layers": 3}, {"head": {"_target_": "models.head.frozen.FrozenHead"}}],
    "causal_lm": [
        {"keep": "even", "draft_vocab_size": 64},
        {"embedding": "own", "head": {"_target_": TIED}},
        {
            "embedding": "own",
            "head": {"_target_": TIED},
            "draft_vocab_size": 64,
        },
        {"head": {"_target_": OWN}, "draft_vocab_size": 64},
        {
            "init": "random",
            "width": 16,
            "num_heads": 2,
            "embedding": "own",
            "head": {"_target_": OWN},
        },
        {
            "init": "width",
            "keep": "importance",
            "width": 24,
            "intermediate_size": 40,
            "num_heads": 2,
            "embedding": "own",
            "head": {"_target_": OWN},
            "draft_vocab_size": 64,
        },
        {"lora": {"r": 4}, "head": {"_target_": OWN}},
        {"head": LOW_RANK},
    ],
    "sorted_lm": [
        {"num_layers": 2, "exits": [1, 2], "embedding": "own", "head": {"_target_": TIED}},
        {"lora": {"r": 4}, "head": {"_target_": OWN}},
    ],
    "eagle": [{"head": {"_target_": OWN}}],
    "eagle3": [
        {"steps": 3, "head": {"_target_": FROZEN}},
        {"steps": 2, "norm_output": True, "feature_layers": [0, 1, 3]},
        {"steps": 2, "head": LOW_RANK},
    ],
    "chimera": [{"num_heads": 3, "head": {"_target_": FROZEN}}],
    "clover2": [{"input": "final", "num_layers": 1, "num_heads": 3, "head": {"_target_": OWN}}],
    "hydra_heads": [
        {"prefix_layer": True, "num_layers": 2},
        {"num_heads": 2},
        {"num_heads": 2, "head": LOW_RANK},
    ],
    "kangaroo": [{"shallow_layers": 3, "head": {"_target_": OWN}}],
    "mlp_speculator": [
        {"tie_weights": False, "scale_input": False, "inner_dim": 48},
        {"init": "target", "head": {"_target_": TIED}, "draft_vocab_size": 64},
    ],
}
OVERFIT = {"own": (0.01, 0.93), "frozen": (1.0, 0.6)}
"""KL(p || q) that may remain on a batch a drafter was fitted to (it starts above 2 nats), and the
share of argmaxes that must agree. A frozen head leaves the blocks too little to learn by heart."""


def families() -> list[str]:
    """The files of models/drafter that define a drafter."""
    folder = Path(inspect.getfile(models.drafter)).parent
    return sorted(p.stem for p in folder.glob("*.py") if p.stem not in NOT_FAMILIES)


def cases() -> list[Any]:
    """(family, overrides) for every family: as configured, reduced, and its own variants."""
    found = []
    for family in families():
        for overrides in [{}, {"draft_vocab_size": 64}, *VARIANTS.get(family, [])]:
            words = [
                f"{key}={'...' if isinstance(value, dict) else value}"
                for key, value in overrides.items()
            ]
            found.append(pytest.param((family, overrides), id=",".join([family, *words])))
    return found


def make(family: str, overrides: dict[str, Any], target: Target) -> Drafter:
    """A drafter as a training run would start it, in evaluation mode."""
    node = copy.deepcopy(configured(family)) | overrides
    torch.manual_seed(0)
    drafter: Drafter = build(
        node,
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        target_shape=target.layer_shape,
        target_config=target.plain_config,
    )
    if drafter.draft_vocab_size is not None:
        generator = torch.Generator().manual_seed(1)
        ids_V = torch.randperm(target.vocab_size, generator=generator)
        drafter.set_vocab(ids_V[: drafter.draft_vocab_size])
    drafter.bind(target)
    texts = torch.randint(0, target.vocab_size, (4, 20), generator=torch.Generator().manual_seed(5))
    drafter.init_from(target, list(texts))
    return drafter.eval()


def configured(family: str) -> dict[str, Any]:
    """conf/drafter/<family>.yaml as plain data."""
    from omegaconf import OmegaConf

    with initialize_config_module("conf", version_base=None):
        # A configuration below a group is placed at that group's key.
        cfg = compose(overrides=[f"+drafter={family}"])
    node = OmegaConf.to_container(cfg.drafter, resolve=True)
    assert isinstance(node, dict)
    return {str(key): value for key, value in node.items()}


def stir(drafter: Drafter, amount: float = 0.3) -> None:
    """Move every parameter: blocks that start at zero would hide what they read."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in drafter.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(amount * noise / math.sqrt(max(parameter.shape[-1], 1)))


@pytest.fixture(scope="module")
def tiny() -> Target:
    return tiny_target(5)


@pytest.fixture(params=cases())
def case(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return request.param


@pytest.fixture
def drafter(case: tuple[str, dict[str, Any]], tiny: Target) -> Drafter:
    stirred = make(*case, tiny)
    stir(stirred)
    return stirred


@pytest.fixture
def text(tiny: Target, drafter: Drafter) -> tuple[Tensor, Features]:
    """Random tokens and the target's features of them."""
    generator = torch.Generator().manual_seed(3)
    tokens_BT = torch.randint(3, tiny.vocab_size, (2, 24), generator=generator)
    return tokens_BT, tiny.forward(tokens_BT, layers=drafter.feature_layers)


def served(drafter: Drafter, k: int, depths: list[Depth]) -> tuple[Depth, int]:
    """The depth that predicts at draft depth k, and how far its index runs ahead of t.

    Shift 1+k stands at index t. A recurrent family's last depth (shift 0) serves every k, and its
    state for (t, k) is the one at index t+1+k.
    """
    depth = depths[served_depth(depths, k)]
    return depth, 1 + k - depth.shift


def state_at(depth: Depth, row: int, index: int) -> Tensor | None:
    """The state of one position; None where the family made none."""
    if depth.positions_BN is None:
        return depth.states_BNd[row, index]
    place = (depth.positions_BN[row] == index).nonzero()
    return depth.states_BNd[row, place[0, 0]] if len(place) else None


def moved(before: Tensor, after: Tensor) -> Tensor:
    """Which positions changed, `[B, N]`."""
    return (before - after).abs().amax(-1) > 1e-5


def test_there_are_families() -> None:
    assert {"medusa", "hydra_heads"} <= set(families())
    assert set(VARIANTS) <= set(families())


@pytest.mark.parametrize("family", families())
def test_file_class_and_config_share_a_name(family: str) -> None:
    name = configured(family)["_target_"]
    assert name == f"models.drafter.{family}." + family.title().replace("_", "")
    module = importlib.import_module(f"models.drafter.{family}")
    assert issubclass(getattr(module, name.rpartition(".")[2]), Drafter)


def test_round_trip(
    drafter: Drafter, tiny: Target, text: tuple[Tensor, Features], tmp_path: Path
) -> None:
    drafter.save_pretrained(tmp_path)
    loaded = load_drafter(tmp_path, tiny)
    assert type(loaded) is type(drafter)
    tokens_BT, features = text
    for ours, theirs in zip(
        drafter.unroll(features, tokens_BT), loaded.unroll(features, tokens_BT), strict=True
    ):
        found = theirs.head(theirs.states_BNd)
        expected = ours.head(ours.states_BNd)
        if any("lora_" in name for name in drafter.state_dict()):  # saved as merged weights
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(found, expected)
    if drafter.draft_ids_D is not None:
        assert loaded.draft_ids_D is not None
        assert torch.equal(drafter.draft_ids_D, loaded.draft_ids_D)
    assert {p.name for p in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}
    assert not list(tmp_path.glob("*.bin"))


def test_nothing_of_the_target_is_stored(drafter: Drafter, tiny: Target) -> None:
    frozen = [tiny.embedding_weight_Vd, tiny.head_weight_Vd]
    for name, tensor in drafter.state_dict().items():
        for weight in frozen:
            same = tensor.shape == weight.shape and torch.equal(tensor, weight)
            assert not same, f"{name} is the target's"
            assert tensor.data_ptr() != weight.data_ptr()


def test_depth_count(drafter: Drafter, text: tuple[Tensor, Features]) -> None:
    tokens_BT, features = text
    depths = list(drafter.unroll(features, tokens_BT))
    assert len(depths) == drafter.num_depths
    limit = drafter.max_depth
    if drafter.max_depth is None and depths[-1].shift == 0:  # recurrent: exits of one network
        assert {depth.shift for depth in depths} == {0}
    else:
        assert [depth.shift for depth in depths] == list(range(1, len(depths) + 1))
        assert limit is None or limit >= len(depths)
    size = drafter.draft_vocab_size or drafter.vocab_size
    for depth in depths:
        assert depth.states_BNd.shape[-1] == drafter.state_size
        assert depth.head(depth.states_BNd[:, :2]).shape == (2, 2, size)


def test_taught_states_are_those_of_the_whole_unroll(
    drafter: Drafter, text: tuple[Tensor, Features]
) -> None:
    """Work that is left out elsewhere changes neither them nor what they teach the weights."""
    tokens_BT, features = text
    T, count = tokens_BT.shape[1], drafter.num_depths
    taught_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
    taught_BT[0, 5:9] = taught_BT[0, 15:17] = taught_BT[1, 11:-1] = True

    def loss_and_states(depths: list[Depth]) -> tuple[Tensor, list[Tensor]]:
        states = []
        for depth in depths:
            assert depth.positions_BN is None, "say which anchors are taught"
            ahead_BT = F.pad(taught_BT[:, depth.shift :], (0, min(depth.shift, T)))
            states.append(depth.states_BNd[ahead_BT])
            if depth.feature_BNd is not None:
                states.append(depth.feature_BNd[ahead_BT])
        return sum((x.square().sum() for x in states), torch.zeros(())), states

    whole = loss_and_states(list(drafter.unroll_to(features, tokens_BT, count)))
    some = loss_and_states(list(drafter.unroll_taught(features, tokens_BT, count, taught_BT)))
    for expected, found in zip(whole[1], some[1], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    weights = [p for p in drafter.parameters() if p.requires_grad]
    expected, found = (torch.autograd.grad(x, weights, allow_unused=True) for x, _ in (whole, some))
    for a, b in zip(expected, found, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4 * float(a.abs().max()))


@pytest.mark.parametrize("cut", [3, 10, 17])
def test_no_leak_from_later_tokens(
    drafter: Drafter, text: tuple[Tensor, Features], cut: int
) -> None:
    """States that may read tokens up to `cut` do not see a change behind it."""
    tokens_BT, features = text
    changed_BT = tokens_BT.clone()
    changed_BT[:, cut + 1 :] = (changed_BT[:, cut + 1 :] + 7) % drafter.vocab_size
    for before, after in zip(
        drafter.unroll(features, tokens_BT), drafter.unroll(features, changed_BT), strict=True
    ):
        assert before.positions_BN is None, "say how sampled anchors are compared"
        # The state at index t reads tokens <= t + shift.
        last = cut - before.shift
        assert not moved(before.states_BNd, after.states_BNd)[:, : max(0, last + 1)].any()


@pytest.mark.parametrize("cut", [3, 10, 17])
def test_no_leak_from_later_features(
    drafter: Drafter, text: tuple[Tensor, Features], cut: int
) -> None:
    """States at positions <= `cut` do not see other features behind it; later ones do.

    Layers that a drafter computes itself while drafting stay: they stand for the tokens.
    """
    tokens_BT, features = text
    noise = torch.Generator().manual_seed(4)

    def disturb(hidden_BTd: Tensor) -> Tensor:
        changed_BTd = hidden_BTd.clone()
        tail_BTd = changed_BTd[:, cut + 1 :]
        tail_BTd += torch.randn(tail_BTd.shape, generator=noise)
        return changed_BTd

    other = Features(
        disturb(features.final_BTd),
        {k: h if k in drafter.computed_layers else disturb(h) for k, h in features.layers.items()},
    )
    for before, after in zip(
        drafter.unroll(features, tokens_BT), drafter.unroll(other, tokens_BT), strict=True
    ):
        seen = moved(before.states_BNd, after.states_BNd)
        # A recurrent family's state at index t+1+k belongs to position t: one index later.
        assert not seen[:, : cut + 1 + int(before.shift == 0)].any()
        if before.shift > 0:
            assert seen[:, cut + 1 :].all(), "the features are not read at all"


def test_training_states_are_decoding_states(
    drafter: Drafter, text: tuple[Tensor, Features]
) -> None:
    """Unrolled with true tokens = drafted step by step with true tokens, wherever it starts and in
    whatever pieces the verified positions arrive."""
    tokens_BT, features = text
    steps = min(drafter.max_depth or 4, 4)
    depths = list(drafter.unroll_to(features, tokens_BT, steps))
    compared = 0
    for start, pieces in ((1, []), (1, [1, 1, 1]), (4, [3, 1, 4]), (12, [2]), (18, [])):
        # The features of positions 0..t have been read; the root is x_{t+1}.
        t = start - 1
        state = drafter.start(features[:1, :start], tokens_BT[:1, : start + 1])
        for piece in pieces:
            new = slice(t + 1, t + 1 + piece)
            ahead = tokens_BT[:1, t + 2 : t + 2 + piece]
            state = drafter.extend(state, features[:1, new], ahead)
            t += piece
        for k in range(steps):
            token_1 = tokens_BT[0, t + 1 + k : t + 2 + k]
            state, states_Nd = drafter.step(
                state, k, Frontier(token_1, torch.zeros(1, dtype=torch.long))
            )
            depth, ahead_by = served(drafter, k, depths)
            expected_d = state_at(depth, 0, t + ahead_by)
            if expected_d is None:
                continue
            compared += 1
            assert torch.allclose(states_Nd[0], expected_d, atol=1e-4), f"t={t}, k={k}"
            logits_D = drafter.head(k)(states_Nd[0])
            assert torch.allclose(logits_D, depth.head(expected_d), atol=1e-4)
    assert compared >= 5 * steps - 2


def test_a_tree_gives_each_node_the_states_of_its_own_path(
    drafter: Drafter, text: tuple[Tensor, Features]
) -> None:
    """Two branches drafted at once = each drafted alone, and the state survives both."""
    tokens_BT, features = text
    state = drafter.start(features[:1, :6], tokens_BT[:1, :7])
    if (drafter.max_depth or 3) < 2:
        pytest.skip("this drafter has one depth")
    root = Frontier(tokens_BT[0, 6:7], torch.zeros(1, dtype=torch.long))
    zeros = torch.zeros(1, dtype=torch.long)
    branches = torch.tensor([11, 12, 13])
    alone = []
    for token in branches:
        below, _ = drafter.step(state, 0, root)
        _, states_Nd = drafter.step(below, 1, Frontier(token[None], zeros))
        alone.append(states_Nd[0])
    below, _ = drafter.step(state, 0, root)
    _, together_Nd = drafter.step(below, 1, Frontier(branches, zeros.expand(3)))
    assert torch.allclose(together_Nd, torch.stack(alone), atol=1e-5)


def fit(drafter: Drafter, target: Target, tokens_BT: Tensor, steps: int) -> Iterator[float]:
    """Adam on the soft cross-entropy with the target's p over the draft vocabulary; yields KL."""
    features = target.forward(tokens_BT, layers=drafter.feature_layers)
    p_BTV = target.project(features.final_BTd)
    if drafter.draft_ids_D is not None:
        p_BTV = p_BTV[..., drafter.draft_ids_D]
    p_BTV = p_BTV.softmax(-1)
    trained = [p for p in drafter.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1.0, 2 * (1 - step / steps))
        losses = []
        for depth in drafter.unroll(features, tokens_BT):
            end = p_BTV.shape[1] - depth.shift
            log_q = F.log_softmax(depth.head(depth.states_BNd[:, :end]), dim=-1)
            p = p_BTV[:, depth.shift :]
            losses.append((p * (p.clamp_min(1e-9).log() - log_q)).sum(-1).mean())
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield float(loss.detach())


def test_overfits_one_batch(case: tuple[str, dict[str, Any]], tiny: Target) -> None:
    """Few positions can be learned by heart: KL(p || q) falls to nearly 0 and argmaxes agree."""
    drafter = make(*case, tiny)
    own = any(True for _ in drafter.head(0).parameters())
    bound, share = OVERFIT["own" if own else "frozen"]
    generator = torch.Generator().manual_seed(6)
    tokens_BT = torch.randint(3, tiny.vocab_size, (1, 14), generator=generator)
    losses = list(fit(drafter, tiny, tokens_BT, steps=250))
    # A model cut from the target starts close already.
    assert losses[-1] < min(bound, losses[0] / 2)
    features = tiny.forward(tokens_BT, layers=drafter.feature_layers)
    logits_BTV = tiny.project(features.final_BTd)
    if drafter.draft_ids_D is not None:
        logits_BTV = logits_BTV[..., drafter.draft_ids_D]
    right = total = 0
    for depth in drafter.unroll(features, tokens_BT):
        end = tokens_BT.shape[1] - depth.shift
        drafted = depth.head(depth.states_BNd[:, :end]).argmax(-1)
        right += int((drafted == logits_BTV[:, depth.shift :].argmax(-1)).sum())
        total += drafted.numel()
    assert right >= share * total


def test_greedy_decoding_is_the_targets_own(case: tuple[str, dict[str, Any]], tiny: Target) -> None:
    """Token for token, with a drafter that was fitted so that some drafts are accepted."""
    drafter = make(*case, tiny)
    prompts = [[5, 9, 17, 30, 44, 100], [7], [60, 61, 62]]
    plain = Decoder(target=tiny, drafter=None, verifier=Greedy(), policy=None)
    truth = [plain.generate(p, max_new_tokens=24, stop_at_eos=False).tokens for p in prompts]
    for _ in fit(drafter, tiny, torch.tensor([[*prompts[0], *truth[0]]]), steps=60):
        pass
    gamma = min(drafter.max_depth or 3, 3)
    accuracy = [[0.5, 0.3, 0.1]] * gamma
    drafter.eval()
    for policy in (Chain(gamma=gamma), StaticTree(nodes=9, accuracy_KR=accuracy)):
        decoder = Decoder(target=tiny, drafter=drafter, verifier=Sampling(), policy=policy)
        accepted = 0
        for prompt, tokens in zip(prompts, truth, strict=True):
            made = decoder.generate(prompt, max_new_tokens=24, stop_at_eos=False)
            assert made.tokens == tokens
            accepted += sum(r.accepted for r in made.rounds)
        assert accepted >= 3, "nothing was drafted right, so nothing was tested"


def test_sampling_keeps_the_targets_distribution(case: tuple[str, dict[str, Any]]) -> None:
    """Counts of two-token texts (the second comes from a draft round) against the exact law."""
    small = tiny_target(3, vocab_size=6)
    family, overrides = case
    if overrides.get("draft_vocab_size"):
        overrides = overrides | {"draft_vocab_size": 4}
    drafter = make(family, overrides, small)
    stir(drafter)
    temperature, runs, prompt = 1.2, 400, [4, 1]
    law = text_law(small, prompt, 2, temperature)
    decoder = Decoder(
        target=small,
        drafter=drafter,
        verifier=Sampling(),
        policy=Chain(gamma=1, temperature=temperature, seed=1),
        temperature=temperature,
        seed=11,
    )
    counts = dict.fromkeys(law, 0)
    for _ in range(runs):
        made = decoder.generate(prompt, max_new_tokens=2, stop_at_eos=False)
        counts[tuple(made.tokens)] += 1
    statistic, bound = chi_square(list(counts.values()), [runs * p for p in law.values()])
    assert statistic < bound
