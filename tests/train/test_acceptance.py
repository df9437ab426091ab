"""Training an acceptance head: labels, what training and decoding read, families, refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from decode.bandwidth import count_reads
from decode.stop.base import SeenLive
from decode.stop.specdec_pp import SpecDecPp
from decode.tree.chain import Chain
from export.check import check_export
from export.hf import HfExporter
from models.acceptance import AcceptanceHead, numbers_of
from models.drafter.base import Children, Drafter, Frontier
from models.drafter.load import load_drafter
from models.run import open_run
from models.target import Target
from tests.train.conftest import Recipe
from train.acceptance import Acceptance, Judged, draw_candidates


def plan(**given: Any) -> Acceptance:
    settings: Any = {"temperature": 1.0} | given
    return Acceptance(**settings)


@pytest.fixture(scope="module")
def small_lm(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "small_lm"
    sampled = (
        "dataset.respond.samples=[{temperature: 0.0, top_p: 1.0}, {temperature: 1.0, top_p: 1.0}]"
    )
    return recipe.run(
        folder, "+experiment=small_lm", "dataset.name=sampled", sampled, "final_decode=null",
        without="final_decode",
    )  # fmt: skip


def test_the_loss_by_hand() -> None:
    """Two rows, P = 1/2 and 0.8, a = 0.25 and 1, w = 6."""
    logits_N = torch.tensor([0.0, torch.tensor(0.8).logit().item()])
    judged = Judged(logits_N, torch.tensor([0.25, 1.0]), torch.tensor(0.0))
    half, eighth = torch.log(torch.tensor(2.0)), -torch.log(torch.tensor(0.8))
    expected = (6 * 0.75 * half + 0.25 * half + eighth) / (6 * 0.75 + 0.25 + 1.0)
    assert float(judged.loss(6.0)) == pytest.approx(float(expected))


def test_the_weight_is_undone_exactly() -> None:
    """The least weighted loss is at odds a / (w (1 - a)); log w brings them back to a / (1 - a)."""
    label = torch.full((1,), 0.7)
    logit = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([logit], lr=2.0)
    for _ in range(300):
        optimizer.zero_grad()
        Judged(logit, label, label).loss(6.0).backward()
        optimizer.step()
    assert float(torch.sigmoid(logit.detach() + torch.log(torch.tensor(6.0)))) == pytest.approx(
        0.7, abs=1e-3
    )


class OneView:
    """A drafter and a target whose rows are given."""

    draft_ids_D: Tensor | None = None

    def __init__(self, q_ND: Tensor, p_NV: Tensor, ids_D: Tensor | None) -> None:
        self.draft_ids_D = ids_D
        self.p_NV, self.q_ND = p_NV, q_ND
        self.target = self
        self.dtype = torch.float32

    def project(self, final_nd: Tensor) -> Tensor:
        return self.p_NV[final_nd[:, 0].long()].log()

    def head(self, states_nd: Tensor) -> Tensor:
        return self.q_ND[states_nd[:, 0].long()].log()

    def to_target_ids(self, ids: Tensor) -> Tensor:
        return ids if self.draft_ids_D is None else self.draft_ids_D[ids]


@pytest.mark.parametrize("reduced", [False, True])
def test_labels_are_the_ratio_and_the_overlap(reduced: bool) -> None:
    p_NV = torch.tensor([[0.5, 0.3, 0.2]]).repeat(3000, 1)
    q_ND = torch.tensor([[0.2, 0.8]] if reduced else [[0.1, 0.6, 0.3]]).repeat(3000, 1)
    ids_D = torch.tensor([0, 2]) if reduced else None
    rows_Nd = torch.zeros(3000, 1)
    drafter: Any = OneView(q_ND, p_NV, ids_D)
    torch.manual_seed(0)
    made = draw_candidates(drafter, drafter, rows_Nd, rows_Nd, plan())
    expected = [1.0, 0.2 / 0.8] if reduced else [1.0, 0.5, 0.2 / 0.3]
    for token, label in enumerate(expected):
        assert torch.allclose(made.label_N[made.draft_N == token], torch.tensor(label))
    # Candidates come from q, so the mean ratio is the overlap.
    overlap = draw_candidates(drafter, drafter, rows_Nd, rows_Nd, plan(label="overlap")).label_N
    assert float(overlap[0]) == pytest.approx(0.4 if reduced else 0.6)
    assert float(made.label_N.mean()) == pytest.approx(float(overlap[0]), abs=0.03)
    greedy = draw_candidates(drafter, drafter, rows_Nd, rows_Nd, plan(temperature=0.0))
    assert set(greedy.label_N.tolist()) == {0.0}  # best of p is 0, of q another
    share = torch.bincount(made.draft_N) / 3000
    assert torch.allclose(share, q_ND[0], atol=0.03)


class Recorder(Chain):
    """A greedy chain that notes what the head says of each draft."""

    def __init__(self, gamma: int) -> None:
        super().__init__(gamma=gamma)
        self.said: list[float] = []

    def grow(
        self, depth: int, frontier: Frontier, logits_ND: Tensor, drafter: Drafter
    ) -> Children | None:
        seen = SeenLive(
            depth,
            logits_ND=logits_ND,
            drafted_N=logits_ND.argmax(-1),
            states_Nd=self._states_Nd,
            drafter=drafter,
            judge=drafter.acceptance,
        )
        self.said.append(seen.judged)
        return super().grow(depth, frontier, logits_ND, drafter)


@pytest.mark.parametrize("reads", ["candidate", "drawn"])
def test_a_head_reads_the_same_while_training_and_decoding(small_lm: Path, reads: str) -> None:
    run = open_run(small_lm)
    target = run.load_target()
    drafter = run.load_drafter(target)
    torch.manual_seed(2)
    head = plan(reads=reads, rejection_weight=2.0).head(drafter)
    for block in head.blocks:
        torch.nn.init.normal_(block.linear.weight, std=0.1)  # type: ignore[union-attr, arg-type]
    drafter.set_acceptance(head)
    prompt_1T = torch.tensor([[5, 9, 17, 30, 40]])
    features = target.forward(prompt_1T)
    state = drafter.start(features[:, :-1], prompt_1T)
    policy = Recorder(gamma=3)
    tree = drafter.propose(state, prompt_1T[0, -1:], policy)
    # Training: the same text with its drafts, all positions at once.
    text_1T = torch.cat([prompt_1T, tree.tokens_N[None, 1:]], dim=1)
    with torch.no_grad():
        view = list(drafter.unroll(target.forward(text_1T), text_1T))[-1]
        states_Td = view.states_BNd[0]
        if reads == "candidate":
            # The state that read draft k stands at its own position.
            expected = head.logits(states_Td[4:7])
        else:
            # The state that draft k was drawn from stands one before it.
            logq_3D = view.head(states_Td[4:7]).log_softmax(-1)
            best_3 = logq_3D.argmax(-1)
            embedded_3e = drafter.embed(drafter.to_target_ids(best_3))
            expected = head.logits(states_Td[4:7], embedded_3e, numbers_of(logq_3D, best_3))
    assert policy.said == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_run_carries_its_head(small_lm: Path, recipe: Recipe, tmp_path: Path) -> None:
    given = ["+experiment=specdec_pp", f"start={small_lm}", "acceptance.stride=6"]
    made = recipe.run(tmp_path / "runs" / "x", *given, "trainer.max_steps=4")
    config = json.loads((made / "drafter" / "config.json").read_text())["acceptance"]
    assert (config["reads"], config["temperature"], len(config["scale"])) == ("candidate", 1.0, 8)
    assert set(config["calibration"]) >= {"token_ece", "survival_ece"}
    assert (made / "reliability.png").is_file()
    run = open_run(made)
    target = run.load_target()
    head = run.load_drafter(target).acceptance
    assert head is not None
    assert head.config == config
    # The drafter itself is what it was.
    before, after = open_run(small_lm).load_drafter(target), run.load_drafter(target)
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, after.state_dict()[name]), name
    # An export in our own format has it, and is checked with it.
    drafter = run.load_drafter(target)
    out = tmp_path / "hf"
    HfExporter().write(drafter, out)
    assert check_export(out) == "hf"
    exported = load_drafter(out, target).acceptance
    assert exported is not None
    assert exported.config == config
    file = out / "acceptance.safetensors"
    weights = load_file(file)
    save_file({name: weights[name] for name in list(weights)[1:]}, file)
    with pytest.raises(ValueError, match=r"acceptance\.safetensors"):
        check_export(out)
    # Its weights are read once for every token that is judged.
    state = drafter.start(target.forward(torch.tensor([[5, 9]])), torch.tensor([[5, 9, 17]]))
    read = {}
    for name, stop in (
        ("none", None),
        ("head", SpecDecPp(threshold=0.99, acceptance=drafter.acceptance)),
    ):
        with count_reads(drafter) as counter:
            drafter.propose(state, torch.tensor([17]), Chain(gamma=4, stop=stop))
        read[name] = counter.read
    # Behind the first of four drafts there is nothing to judge.
    judged = sum(p.numel() * p.element_size() for p in head.parameters())
    assert read["head"] - read["none"] == 3 * judged
    # The head did learn.
    torch.manual_seed(0)
    assert float(head.blocks[0].linear.weight.detach().abs().sum()) > 0  # type: ignore[union-attr, operator]


def test_trained_together_both_move(small_lm: Path, recipe: Recipe, tmp_path: Path) -> None:
    given = ["+experiment=specdec_pp", f"start={small_lm}", "acceptance.frozen=false"]
    made = recipe.run(
        tmp_path / "runs" / "x", *given, "acceptance.stride=9", "acceptance.reads=drawn",
        "acceptance.label=overlap", "final_decode=null", without="final_decode",
    )  # fmt: skip
    target: Target = open_run(made).load_target()
    before = open_run(small_lm).load_drafter(target).state_dict()
    after = open_run(made).load_drafter(target).state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_prompts_that_the_drafter_has_not_seen(
    small_lm: Path, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run's own dataset unless another is given; calibrated on that one's held-out prompts."""
    given = ["+experiment=specdec_pp", f"start={small_lm}", "acceptance.temperature=0"]
    made = {}
    for data in ("start", "given"):
        folder = recipe.run(
            tmp_path / data, *given, f"acceptance.data={data}", "acceptance.stride=9",
            "dataset.holdout=6", "dataset.name=fresh", "final_decode=null", without="final_decode",
        )  # fmt: skip
        run = open_run(folder)
        made[data] = (run.config.dataset.name, run.config.drafter)
        head = run.load_drafter(run.load_target()).acceptance
        assert head is not None
        assert head.calibration is not None
        assert head.calibration["prompts_measured"] == (3 if data == "given" else 2)
    assert (made["start"][0], made["given"][0]) == ("sampled", "fresh")
    assert capsys.readouterr().err.count("learns from 'sampled'") == 1  # dataset= counted once
    assert made["start"][1] == made["given"][1]


@pytest.mark.parametrize(
    ("family", "overrides"), [("hydra_heads", ["drafter.num_heads=2"]), ("kangaroo", [])]
)
def test_heads_for_other_families(
    recipe: Recipe, tmp_path: Path, family: str, overrides: list[str]
) -> None:
    first = recipe.run(tmp_path / "a", f"+experiment={family}", *overrides)
    given = ["+experiment=specdec_pp", f"start={first}", "acceptance.temperature=0"]
    made = recipe.run(
        tmp_path / "b", *given, "acceptance.stride=9", "final_decode=null", without="final_decode"
    )
    head = open_run(made).load_drafter(open_run(made).load_target()).acceptance
    assert head is not None
    assert head.reads == ("drawn" if family == "hydra_heads" else "candidate")
    assert len(head.scale) == (2 if family == "hydra_heads" else 8)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["start=null"], "but none was named"),
        (["acceptance.temperature=0.7"], "needs answers that the target gave"),
        (["acceptance.mixing=1"], r"acceptance\.mixing=1"),
        (["onpolicy=gkd"], "onpolicy or weighting was given"),
    ],
)
def test_what_cannot_be_learned_is_refused(
    small_lm: Path, recipe: Recipe, tmp_path: Path, overrides: list[str], message: str
) -> None:
    given = ["+experiment=specdec_pp", f"start={small_lm}", *overrides]
    with pytest.raises(ValueError, match=message):
        recipe.run(tmp_path / "x", *given)


def test_a_described_head_without_weights_is_refused(tmp_path: Path) -> None:
    head = AcceptanceHead(state_size=4, embedding_size=4, reads="drawn")
    (tmp_path / "config.json").write_text("{}")
    head.save(tmp_path)
    (tmp_path / "acceptance.safetensors").unlink()
    config = json.loads((tmp_path / "config.json").read_text())["acceptance"]
    with pytest.raises(ValueError, match="copy the whole folder"):
        AcceptanceHead.load(tmp_path, config)
