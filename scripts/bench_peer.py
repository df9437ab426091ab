"""The loss of the speculators library, measured like ours; runs in an environment that has it.

Called by scripts.bench_loss with --peer. Two counts:

  ours     draft states, draft head, target states and target head go in, gradients of states and
           (trained) head come out; both projections to logits are part of it
  region   the library's own view: both logits [T, V] are given, the gradient of the draft's comes
           out and is counted

Its losses are eager on a CPU and fused (Triton) on an accelerator, as its trainer chooses.

Shape legend: T positions, d hidden size, V vocabulary.
"""

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from scripts.peak import measured

NAMES = {
    "forward_kl": "kl_div_loss",
    "reverse_kl": "reverse_kl_div_loss",
    "jsd": "js_div_loss",
    "tvd": "tv_loss",
    "lk_alpha": "neg_log_acceptance_loss",
    "lk_lambda": "lk_hybrid_loss",
}
"""Files of conf/loss and what the library calls the same."""

DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}


def load(name: str, device: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The library's loss for this device."""
    if name not in NAMES:
        raise SystemExit(f"speculators has no loss like '{name}'; it has {sorted(NAMES)}")
    if device == "cuda":
        from speculators.losses import utils as chosen  # type: ignore[import-not-found]
    else:
        from speculators.losses import eager as chosen  # type: ignore[import-not-found]
    return getattr(chosen, NAMES[name])


def run(case: dict[str, Any]) -> dict[str, float]:
    """Both counts of one case."""
    torch.manual_seed(0)
    device = case["device"]
    T, d, V = case["positions"], case["hidden"], case["vocab"]
    if case["precision"] not in DTYPES:
        raise SystemExit(f"the peer runs in {sorted(DTYPES)}, not in {case['precision']}")
    make: dict[str, Any] = {"dtype": DTYPES[case["precision"]], "device": device}
    loss = load(case["loss"], device)
    states_Td = torch.randn(T, d, **make).requires_grad_()
    final_Td = torch.randn(T, d, **make)
    target_Vd = torch.empty(V, d, **make)
    draft_Vd = torch.empty(V, d, **make) if case["head"] == "trained" else target_Vd
    for weight_Vd in (target_Vd, draft_Vd):
        for part in weight_Vd.split(8192):
            part.copy_(torch.randn(part.shape, device=device).mul_(d**-0.5))
    draft_Vd.requires_grad_(case["head"] == "trained")
    inputs = [states_Td, *([draft_Vd] if case["head"] == "trained" else [])]

    def whole() -> list[Tensor]:
        with torch.no_grad():
            targets_1TV = F.linear(final_Td, target_Vd.detach())[None]
        logits_1TV = F.linear(states_Td, draft_Vd)[None]
        return list(torch.autograd.grad(loss(logits_1TV, targets_1TV).mean(), inputs))

    found = measured(whole, device, case["repeats"])
    with torch.no_grad():
        targets_1TV = F.linear(final_Td, target_Vd)[None]
        logits_1TV = F.linear(states_Td, draft_Vd)[None]
    logits_1TV.requires_grad_()

    def region() -> list[Tensor]:
        return list(torch.autograd.grad(loss(logits_1TV, targets_1TV).mean(), [logits_1TV]))

    own = measured(region, device, case["repeats"])
    return found | {
        "region_mb": own["beyond_mb"] + own["returned_mb"],
        "region_seconds": own["seconds"],
    }


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", required=True)
    sys.stdout.write(json.dumps(run(json.loads(parser.parse_args().one))) + "\n")


if __name__ == "__main__":
    main()
