"""A small network picks how many tokens to draft, for the most tokens per second (SpecKV).

Shape legend: N rounds, G longest draft, F inputs.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from decode.stop.base import Seen, Stop

FILE = Path("tune") / "spec_kv.safetensors"
"""In the run's folder."""
INPUTS, HIDDEN = 4, 16
MEMORY = 0.9
"""Weight of the past in the running acceptance, a round."""
STEPS, RATE = 400, 0.02


class LengthNet(nn.Module):
    """Inputs `[N, F]` -> the chance that the first k drafts of a round survive, `[N, G]`.

    One hidden layer; its outputs are chances *given* that the drafts before were accepted, and the
    survival is their running product, so that it falls with k.
    """

    def __init__(self, longest: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, longest))

    def forward(self, inputs_NF: Tensor) -> Tensor:
        return torch.sigmoid(self.net(inputs_NF)).cumprod(-1)


class History:
    """The running share of accepted drafts among those tested, over past rounds."""

    def __init__(self) -> None:
        self.rate = 0.5

    def verified(self, tested: int, accepted: int) -> None:
        if tested:
            self.rate = MEMORY * self.rate + (1.0 - MEMORY) * accepted / tested

    def inputs(self, seen: Seen) -> list[float]:
        """What the network reads behind the first draft of a round."""
        return [seen.best, seen.drawn, seen.entropy, self.rate]


class SpecKv(Stop):
    """Draft gamma = argmax_g (1 + sum_{k <= g} S_k) / t_g tokens, chosen behind the first of them.

    S_k is the chance that k drafts survive (`LengthNet`), t_g the milliseconds of a whole round
    with g drafts, both learned from a trace of this run on this machine by
    `python -m decode tune=true`. As published (SpecKV) the objective leaves time out and always
    prefers the longest draft.
    """

    def __init__(self, *, run_dir: Path) -> None:
        self.net, self.round_ms = load(run_dir / FILE)
        self.history = History()
        self._length = 1

    @property
    def name(self) -> str:
        """The rule in a word, for folders and tables."""
        return "spec_kv"

    def ends(self, seen: Seen) -> bool:
        """Behind as many drafts as were chosen at the first."""
        if seen.depth == 0:
            self._length = self.choose(seen)
        return seen.depth + 1 >= self._length

    @torch.no_grad()
    def choose(self, seen: Seen) -> int:
        """gamma of this round."""
        survival_G = self.net(torch.tensor([self.history.inputs(seen)]))[0]
        rates_G = (1.0 + survival_G.cumsum(-1)) / torch.tensor(self.round_ms)
        return 1 + int(rates_G.argmax())

    def verified(self, tested: int, accepted: int) -> None:
        self.history.verified(tested, accepted)


def fit(inputs: Sequence[Sequence[float]], accepted: Sequence[int], longest: int) -> LengthNet:
    """The network with the least cross-entropy of "depth k passed" among rounds that reached k."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = LengthNet(longest)
    inputs_NF = torch.tensor(inputs, dtype=torch.float32)
    accepted_N1 = torch.tensor(accepted)[:, None]
    depth_G = torch.arange(longest)
    reached_NG, passed_NG = accepted_N1 >= depth_G, (accepted_N1 > depth_G).float()
    optimizer = torch.optim.Adam(net.parameters(), lr=RATE)
    for _ in range(STEPS):
        loss_NG = nn.functional.binary_cross_entropy_with_logits(
            net.net(inputs_NF), passed_NG, reduction="none"
        )
        loss = loss_NG[reached_NG].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


def save(file: Path, net: LengthNet, round_ms: Sequence[float]) -> None:
    """The network and the times it weighs, in one file, atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    save_file(net.state_dict(), temporary, metadata={"round_ms": json.dumps(list(round_ms))})
    temporary.replace(file)


def load(file: Path) -> tuple[LengthNet, list[float]]:
    """What `save` wrote."""
    if not file.is_file():
        raise ValueError(
            f"stop=spec_kv reads a network from '{file}', which is not there, because it is "
            "learned from a trace on the machine it serves; run `python -m decode tune=true "
            "run=<this run>` first, or use another rule."
        )
    try:
        with safe_open(file, framework="pt") as reader:
            round_ms = json.loads(reader.metadata()["round_ms"])
            net = LengthNet(len(round_ms))
            net.load_state_dict({name: reader.get_tensor(name) for name in reader.keys()})  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"'{file}' is not what stop=spec_kv expects ({error}); delete it and run "
            "`python -m decode tune=true` again."
        ) from error
    return net.eval(), [float(ms) for ms in round_ms]
