"""Traces that are kept in a run's folder, under names made of everything they depend on."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from decode.answers import Recorded
from decode.trace import Trace, Walked, trace
from models.drafter.base import Drafter
from models.target import Target


def kept_trace(
    target: Target,
    drafter: Drafter,
    answers: Sequence[Recorded],
    *,
    run_dir: Path,
    gamma: int,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    leave_at: int | None = None,
    on_answer: Callable[[int, float], None] | None = None,
) -> Trace:
    """The trace of these answers, from `run_dir`/tune or made now and kept there, under a name made
    of everything it depends on."""
    digest = hashlib.sha256()
    for name, tensor in sorted(drafter.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    if drafter.acceptance is not None:
        for tensor in drafter.acceptance.state_dict().values():
            digest.update(tensor.cpu().numpy().tobytes())
    asked = [(a.prompt.id, a.text) for a in answers]
    settings = [gamma, temperature, max_new_tokens, seed, str(target.dtype), target.fingerprint()]
    settings += [] if leave_at is None else [leave_at]
    digest.update(json.dumps([asked, settings]).encode())
    file = run_dir / "tune" / f"trace-{digest.hexdigest()[:16]}.safetensors"
    judge = drafter.acceptance
    if file.is_file():
        lag = 0 if judge is None else judge.lag
        return _load(file, Trace(gamma, temperature, lag, leave_at=leave_at))
    made = trace(
        target,
        drafter,
        answers,
        gamma=gamma,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
        leave_at=leave_at,
        on_answer=on_answer,
    )
    _save(file, made)
    return made


ARRAYS = ("starts_I", "tested_I", "accepted_I", "ends_I", "signals_IKS")


def _save(file: Path, made: Trace) -> None:
    """One file, written beside its place and then renamed."""
    tensors = {
        f"{number}.{name}": torch.from_numpy(getattr(walked, name))
        for number, walked in enumerate(made.walked)
        for name in ARRAYS
    }
    about = [[walked.prompt_id, walked.length] for walked in made.walked]
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    save_file(tensors, temporary, metadata={"answers": json.dumps(about)})
    temporary.replace(file)


def _load(file: Path, empty: Trace) -> Trace:
    with safe_open(file, framework="pt") as reader:
        for number, (prompt_id, length) in enumerate(json.loads(reader.metadata()["answers"])):
            arrays = {name: reader.get_tensor(f"{number}.{name}").numpy() for name in ARRAYS}
            empty.walked.append(Walked(prompt_id=prompt_id, length=length, **arrays))
    return empty
