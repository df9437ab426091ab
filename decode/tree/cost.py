"""What a draft tree costs in time: given, or measured with the real target and drafter.

Shape legend: N frontier nodes, M children, D draft vocabulary.
"""

import json
import os
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conf.console import say
from data_prep.manifest import write_json
from decode.session import Decoder
from decode.tree.static import TreeShape
from decode.verifier.sampling import Sampling
from models.drafter.base import Children, Drafter, Frontier, Policy
from models.target import Target
from models.tree import Tree

CONTEXT = 256
"""Tokens before the first timed round."""
READ, STEPPED, DEPTHS = (2, 8, 16, 32, 64, 128), (1, 12), 3
"""Sizes that are timed: nodes read, nodes stepped, and depths (later ones cost what the last
does)."""
REPEATS = 4
"""Tokens written for each combination of nodes read and stepped: two to four rounds."""


@dataclass(frozen=True)
class Cost:
    """Milliseconds of one round, as a sum of parts.

    `target_ms[m]`: the target reads m tokens (root included). `draft_ms[k-1][n]`: the drafter's
    step at depth k on n nodes; the last entry serves all later depths. `round_ms`: what every round
    costs, that is the step at the root, reading what was accepted, and verification. Between sizes
    that were measured it is a straight line, beyond them it goes on.
    """

    target_ms: dict[int, float]
    draft_ms: list[dict[int, float]]
    round_ms: float = 0.0

    def of(self, shape: TreeShape) -> float:
        """Milliseconds of a round with this tree."""
        extended = {path[:-1] for path in shape.paths}
        total = self.round_ms + along(self.target_ms, shape.nodes)
        for depth in range(1, shape.depth):
            rows = sum(len(path) == depth for path in extended)
            total += along(self.draft_ms[min(depth, len(self.draft_ms)) - 1], rows)
        return total


def along(points: dict[int, float], size: int) -> float:
    """The value at `size` on straight lines through the points, never below their smallest."""
    sizes = sorted(points)
    if len(sizes) == 1:
        return points[sizes[0]]
    low, high = next(((a, b) for a, b in pairwise(sizes) if size <= b), (sizes[-2], sizes[-1]))
    slope = (points[high] - points[low]) / (high - low)
    return max(points[low] + slope * (size - low), min(points.values()))


class Probe(Policy):
    """Drafts of given sizes in turn: so many nodes verified, so many stepped at every depth.

    It notes when each depth's children were chosen: the time between two of them is one step of the
    drafter, its head, and choosing.
    """

    name = "probe"

    def __init__(self, *, sizes: list[tuple[int, int]], depth: int) -> None:
        self.sizes = sizes
        self.depth = depth
        self.times: list[list[float]] = []  # of every round: the clock at every depth

    def size(self, number: int) -> tuple[int, int]:
        """Nodes and rows of a round."""
        return self.sizes[number % len(self.sizes)]

    def grow(
        self, depth: int, frontier: Frontier, logits_ND: Tensor, drafter: Drafter
    ) -> Children | None:
        """Children to extend, all below the first node, and at depth 0 enough leaves besides."""
        if depth == 0:
            self.times.append([])
        nodes, rows = self.size(len(self.times) - 1)
        count = max(rows, nodes - 1) if depth == 0 else rows
        best_R = logits_ND.topk(min(10, logits_ND.shape[-1]), dim=-1).indices[0]
        places_M = torch.arange(count, device=logits_ND.device)
        tokens_M = drafter.to_target_ids(best_R[places_M % len(best_R)])
        self.times[-1].append(clock(logits_ND.device))
        expand_M = (places_M < rows) & (depth + 1 < self.depth)
        ones_M = torch.ones(count, device=logits_ND.device)
        return Children(tokens_M, torch.zeros_like(places_M), ones_M, expand_M)

    def finish(self, tree: Tree) -> Tree:
        """The root and leaves below it, so that a round accepts at most one draft."""
        nodes, _ = self.size(len(self.times) - 1)
        return tree.keep(torch.arange(nodes, device=tree.tokens_N.device))


def clock(device: torch.device) -> float:
    """Seconds, after all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure_cost(*, target: Target, drafter: Drafter, nodes: int, depth: int) -> Cost:
    """Time real rounds of several sizes, up to `nodes` nodes and `depth` depths.

    The context is random tokens: time does not depend on which. Medians over rounds; a larger size
    never costs less than a smaller one.
    """
    read = sorted({size for size in READ if size < nodes} | {nodes})
    depth = min(depth, 1 + DEPTHS)
    sizes = [(size, rows) for rows in STEPPED for size in read]
    # A round gives one token or two, and the prompt's forward one.
    new = REPEATS * len(sizes) + 1
    length = min(CONTEXT, int(target.config.max_position_embeddings) - new)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, target.vocab_size, (max(1, length),), generator=generator).tolist()
    probe = Probe(sizes=sizes, depth=depth)
    decoder = Decoder(target=target, drafter=drafter, verifier=Sampling(), policy=probe)
    made = decoder.generate(prompt, max_new_tokens=new, stop_at_eos=False)
    target_s: dict[int, list[float]] = {size: [] for size in read}
    draft_s: list[dict[int, list[float]]] = [{n: [] for n in STEPPED} for _ in range(depth - 1)]
    other_s: list[float] = []
    for number, (round_, times) in enumerate(zip(made.rounds, probe.times, strict=True)):
        size, rows = probe.size(number)
        steps = [after - before for before, after in pairwise(times)]
        for k, step in enumerate(steps):
            draft_s[k][rows].append(step)
        target_s[size].append(round_.target_s)
        other_s.append(round_.draft_s - sum(steps) + round_.verify_s)
    return Cost(
        target_ms=_rising(target_s),
        draft_ms=[_rising(times) for times in draft_s] or [{1: 0.0}],
        round_ms=1000 * statistics.median(other_s),
    )


def _rising(seconds: dict[int, list[float]]) -> dict[int, float]:
    found = [1000 * statistics.median(times) for times in seconds.values()]
    return dict(zip(seconds, accumulate(found, max), strict=True))


def cached_cost(
    *, target: Target, drafter: Drafter, nodes: int, depth: int, folder: Path | None
) -> Cost:
    """`measure_cost`, kept in `folder`/cost.json and read from there by the same machine."""
    facts = {
        "device": machine(target.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "target": target.name,
        "dtype": str(target.dtype).removeprefix("torch."),
        "nodes": nodes,
        "depth": depth,
        "context": CONTEXT,
    }
    file = None if folder is None else folder / "cost.json"
    if file is not None and file.is_file():
        kept = json.loads(file.read_text())
        if kept["facts"] == facts:
            return read_cost(kept["cost"])
    say(f"Timing the target on up to {nodes} tokens at once and the drafter at {depth} depths.")
    cost = measure_cost(target=target, drafter=drafter, nodes=nodes, depth=depth)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"facts": facts, "cost": asdict(cost)})
        say(f"Written: {file}; delete it to measure again.")
    return cost


def read_cost(plain: dict[str, Any]) -> Cost:
    """A `Cost` out of JSON, whose keys are strings."""
    return Cost(
        target_ms={int(size): ms for size, ms in plain["target_ms"].items()},
        draft_ms=[{int(n): ms for n, ms in depth.items()} for depth in plain["draft_ms"]],
        round_ms=plain["round_ms"],
    )


def machine(device: torch.device) -> str:
    """The accelerator's name, or the processor's kind and number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {os.cpu_count()} cores"
