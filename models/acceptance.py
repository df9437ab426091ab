"""A head that says how likely a drafted token is to be accepted (SpecDec++, arXiv 2405.19715).

Shape legend: N rows, d width of the drafter's states, e width of token embeddings, D draft
vocabulary, K depths.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from models.drafter.blocks import ResidualBlock

if TYPE_CHECKING:
    from models.drafter.base import Drafter

Reads = Literal["candidate", "drawn"]
WEIGHTS = "acceptance.safetensors"
KEY = "acceptance"
"""Where a drafter's config.json describes its head."""
NUMBERS = 3
"""log q of the token, log of the largest q, entropy of q."""


class AcceptanceHead(nn.Module):
    """P(the drafted token y is accepted, given that all before it are) = sigmoid(l / T_k + b_k).

        l = w . blocks(z) + b + log(rejection_weight),   block(x) = x + SiLU(A x + a), each its own

    What it reads (`reads`):
      candidate  z = the drafter's state at y, once the drafter has read it (as published). Only a
                 drafter that reads tokens one by one has it, and it comes with the step that drafts
                 the next token: a rule learns about y one draft late.
      drawn      z = P [s; E(y)] + Q n, with s the state y was drawn from, E(y) its embedding and n
                 three numbers of q: log q(y), log max q and the entropy. Every drafter has these,
                 and they are there when y is drawn.

    Training counts rejections `rejection_weight` (w) times. With a the true chance such a loss is
    least at odds a / (w (1 - a)); adding log w to the logit undoes that exactly. T_k and b_k, two
    numbers for each depth (the last ones serve deeper ones), are fitted afterwards on drafts of
    held-out prompts, so that the product over a chain is the share of chains that survive
    (decode/calibration.py). A drafter is better on prompts it was trained on, where the head
    learns too, so that some heads are sure of too much everywhere: no temperature mends that, b_k
    does.

    `temperature` is the serving temperature of the answers it learned from: the chance depends on
    it. `calibration` says how far from the truth it was on prompts of neither kind.
    """

    def __init__(
        self,
        *,
        state_size: int,
        embedding_size: int,
        reads: Reads,
        num_blocks: int = 3,
        rejection_weight: float = 6.0,
        label: Literal["ratio", "overlap"] = "ratio",
        temperature: float = 1.0,
        scale: Sequence[float] = (1.0,),
        shift: Sequence[float] = (0.0,),
        calibration: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.state_size, self.embedding_size = state_size, embedding_size
        self.reads: Reads = reads
        self.num_blocks, self.rejection_weight = num_blocks, rejection_weight
        self.label, self.temperature = label, temperature
        self.scale = [float(value) for value in scale]
        self.shift = [float(value) for value in shift]
        self.calibration = calibration
        self.mix: nn.Linear | None = None
        if reads == "drawn":
            self.mix = nn.Linear(state_size + embedding_size + NUMBERS, state_size)
        self.blocks = nn.Sequential(
            *(ResidualBlock(hidden_size=state_size) for _ in range(num_blocks))
        )
        self.out = nn.Linear(state_size, 1)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        names = (
            "state_size", "embedding_size", "reads", "num_blocks", "rejection_weight", "label",
            "temperature", "scale", "shift", "calibration",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def raw(
        self, states_Nd: Tensor, embedded_Ne: Tensor | None = None, numbers_N3: Tensor | None = None
    ) -> Tensor:
        """The logits that training weighs, `[N]`: rejections look `rejection_weight` times as
        likely."""
        z_Nd = states_Nd.to(self.out.weight.dtype)
        if self.mix is not None:
            assert embedded_Ne is not None and numbers_N3 is not None
            parts = [z_Nd, embedded_Ne.to(z_Nd.dtype), numbers_N3.to(z_Nd.dtype)]
            z_Nd = self.mix(torch.cat(parts, dim=-1))
        return self.out(self.blocks(z_Nd))[:, 0]

    def logits(
        self, states_Nd: Tensor, embedded_Ne: Tensor | None = None, numbers_N3: Tensor | None = None
    ) -> Tensor:
        """The same with the weight undone, before any T_k and b_k."""
        return self.raw(states_Nd, embedded_Ne, numbers_N3) + math.log(self.rejection_weight)

    @torch.no_grad()
    def judged(
        self, states_Nd: Tensor, *, logq_ND: Tensor, drafted_N: Tensor, drafter: "Drafter"
    ) -> Tensor:
        """While drafting, the logits of the newest token that can be judged, `[N]`, before T_k.

        That is the drafted one, or with reads=candidate the one before: the states have just read
        it.
        """
        if self.out.weight.device != states_Nd.device:
            self.to(states_Nd.device)
        if self.reads == "candidate":
            return self.logits(states_Nd)
        embedded_Ne = drafter.embed(drafter.to_target_ids(drafted_N))
        return self.logits(states_Nd, embedded_Ne, numbers_of(logq_ND, drafted_N))

    @property
    def lag(self) -> int:
        """By how many depths the judged token is behind the drafted one."""
        return int(self.reads == "candidate")

    def chance(self, row: int, logit: float) -> float:
        """The calibrated chance behind the token at depth `row` (0-based). The root needs no
        judging: 1."""
        depth = row - self.lag
        if depth < 0:
            return 1.0
        T, b = (given[min(depth, len(given) - 1)] for given in (self.scale, self.shift))
        return 1.0 / (1.0 + math.exp(-logit / T - b))

    # --- beside a drafter ------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Beside a saved drafter: the weights, and a description in its config.json."""
        file = folder / "config.json"
        config = json.loads(file.read_text()) | {KEY: self.config}
        file.write_text(json.dumps(config, indent=2) + "\n")
        save_model(self, str(folder / WEIGHTS))

    @staticmethod
    def load(folder: Path, config: dict[str, Any]) -> "AcceptanceHead":
        """The head that `config` describes, with the weights in `folder`."""
        head = AcceptanceHead(**config)
        file = folder / WEIGHTS
        if not file.is_file():
            raise ValueError(
                f"'{folder / 'config.json'}' describes an acceptance head, but {WEIGHTS} is "
                "missing beside it; copy the whole folder, or delete the entry "
                f"'{KEY}' to use the drafter without its head."
            )
        load_model(head, str(file), strict=True)
        return head.eval()


def numbers_of(logq_ND: Tensor, drafted_N: Tensor) -> Tensor:
    """log q(y), log max q and H(q), `[N, 3]`; q at temperature 1 over the draft vocabulary."""
    drawn_N = logq_ND.gather(-1, drafted_N[:, None])[:, 0]
    entropy_N = torch.special.entr(logq_ND.exp()).sum(-1)
    # A token of no mass (drawn at another temperature, cut off by a nucleus) stays finite.
    return torch.stack([drawn_N.clamp(min=-30.0), logq_ND.amax(-1), entropy_N], dim=-1)
