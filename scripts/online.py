"""Online speculative decoding (Liu et al., 2023, arXiv 2310.07177): a drafter learns as it serves.

python -m scripts.online run=runs/hydra_heads/latest bench=gsm8k limit=200
python -m scripts.online run=runs/hydra_heads/latest 'streams=[gsm8k, mt_bench]' limit=80
python -m scripts.online resume=<output folder>

Deviations from the released code: errors are taught one position earlier, where it is off by one;
the bonus token after a fully accepted draft is no error; accepted drafts and older texts are
replayed; an update is served only when it is not worse on prompts it has not seen. Files of the
output folder: train/online/folder.py.
"""

from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import conf
from conf.check import build, check, friendly_errors
from conf.console import console, say
from decode.__main__ import SUPPLIED
from decode.prompts import Bench
from decode.session import Decoder
from decode.tree.chain import Chain
from decode.tree.static import StaticTree
from decode.verifier.base import Verifier
from models.drafter.base import Drafter
from models.drafter.load import load_drafter
from models.run import Run, open_run
from models.target import Target
from train.online import folder
from train.online.acceptance import Serving
from train.online.learner import Learner, Updates
from train.online.report import online_tau
from train.online.stream import Asked, Stream, check_window
from train.teacher import Teacher


def online(cfg: DictConfig) -> Path:
    """Serve the stream, or go on with the one in `cfg.resume`. Returns the output folder."""
    if cfg.resume is not None:
        out = Path(cfg.resume)
        cfg = folder.read_config(out)
    else:
        out = None
    cfg.streams = [_bench_node(s) for s in (cfg.streams or [cfg.bench])]
    check(cfg, runtime=SUPPLIED)
    if cfg.run is None:
        raise ValueError(
            "The drafter to start with is not named (run=null), expected a run folder, because an "
            "online drafter continues a trained one; give run=runs/<name>/latest, or "
            "resume=<folder>."
        )
    _check_tree(cfg)
    _check_frozen(cfg)
    check_window(cfg.interval, cfg.window)
    updates: Updates = build(cfg.updates)
    run = open_run(cfg.run)
    target = run.load_target(cfg.dtype)
    benches: list[Bench] = build(
        cfg.streams,
        tokenizer=target.tokenizer,
        dataset_folder=Path(run.config.dataset.root) / run.config.dataset.name,
    )
    asked = [
        Asked(bench.name, prompt)
        for bench in benches
        for prompt in bench.prompts(limit=cfg.limit, max_prompt_tokens=cfg.max_prompt_tokens)
    ]
    if not asked:
        raise ValueError(
            "There is no prompt to serve, expected at least one, because the benchmarks hold none "
            "or all are longer than max_prompt_tokens; raise that or choose another bench."
        )
    stream = _assemble(cfg, run, target, asked, updates)
    if out is None:
        names = "+".join(dict.fromkeys(bench.name for bench in benches))
        shape = _policy(cfg, run, cfg.seed).name
        wanted = cfg.out or run.path / "online" / f"{names}-{shape}-T{cfg.temperature:g}"
        out = folder.begin(Path(wanted), cfg, run)
    else:
        folder.load(stream, out)
    say(f"Output folder: {out}")
    _run(stream, out)
    _finish(cfg, run, stream, out)
    return out


def _bench_node(stream: Any) -> Any:
    """A bench by its name in conf/bench, or as a node of its own."""
    if not isinstance(stream, str):
        return stream
    group = Path(conf.__file__).parent / "bench"
    known = sorted(f.stem for f in group.glob("*.yaml"))
    if stream not in known:
        raise ValueError(
            f"streams names a bench '{stream}', which does not exist; known are "
            f"{', '.join(known)}. A file of your own is a node: "
            "{_target_: decode.prompts.Questions, name: ..., sources: [...]}."
        )
    return OmegaConf.load(group / f"{stream}.yaml")


def _check_tree(cfg: DictConfig) -> None:
    known = ("decode.tree.chain.Chain", "decode.tree.static.StaticTree")
    if cfg.tree._target_ not in known:
        raise ValueError(
            f"Learning while serving was asked for with {cfg.tree._target_}, but drafts are judged "
            "as chains of one known depth, which only fixed shapes have; use tree=chain or "
            "tree=static."
        )


def _check_frozen(cfg: DictConfig) -> None:
    exact = cfg.tree._target_ == "decode.tree.chain.Chain" and not cfg.verifier.get("lossy", False)
    if cfg.frozen and not exact:
        raise ValueError(
            f"frozen=true with tree {cfg.tree._target_} and verifier {cfg.verifier._target_}: what "
            "the first drafter would have given is only known exactly for chains and lossless "
            "rules; use tree=chain with verifier=sampling, or frozen=false."
        )


def _policy(cfg: DictConfig, run: Run, seed: int) -> Any:
    accuracy = run.rank_accuracy() if (run.path / "rank_accuracy.json").is_file() else None
    return build(
        cfg.tree,
        accuracy_KR=accuracy,
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        seed=seed,
    )


def _serving(cfg: DictConfig, policy: Chain | StaticTree) -> Serving:
    """Trees are judged as chains of their depth: the best draft of each node."""
    if isinstance(policy, Chain):
        return Serving(policy.gamma, cfg.temperature, policy.temperature, policy.top_p)
    return Serving(policy.shape.depth, cfg.temperature, 0.0, cfg.top_p)


def _assemble(
    cfg: DictConfig, run: Run, target: Target, asked: list[Asked], updates: Updates
) -> Stream:
    verifier: Verifier = build(cfg.verifier)

    def make_decoder(drafter: Drafter, seed: int) -> Decoder:
        return Decoder(
            target=target,
            drafter=drafter,
            verifier=verifier,
            policy=_policy(cfg, run, seed),
            temperature=cfg.temperature,
            top_p=cfg.top_p,
            seed=seed,
        )

    learner = Learner(
        serving=run.load_drafter(target),
        shadow=load_drafter(run.drafter_folder, target).float(),
        candidate=run.load_drafter(target),
        teacher=Teacher(target=target),
        loss=build(cfg.loss),
        make_optimizer=lambda groups: build(cfg.optimizer, params=groups),
        updates=updates,
        z=cfg.z,
        seed=cfg.seed,
    )
    return Stream(
        asked=asked,
        learner=learner,
        frozen=run.load_drafter(target) if cfg.frozen else None,
        make_decoder=make_decoder,
        how=_serving(cfg, _policy(cfg, run, cfg.seed)),
        max_new_tokens=cfg.max_new_tokens,
        interval=cfg.interval,
        window=cfg.window,
        background=cfg.background,
        seed=cfg.seed,
    )


# --- serving --------------------------------------------------------------------------------------


def _run(stream: Stream, out: Path) -> None:
    columns = (
        TextColumn("serving"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[tau]:.2f} tokens/step, {task.fields[swaps]} swaps"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        done = len(stream.records)
        task = progress.add_task("", total=len(stream.asked), completed=done, tau=1.0, swaps=0)

        def on_prompt(stream: Stream) -> None:
            last = stream.records[-stream.window :]
            rounds = sum(r.served.rounds for r in last)
            tau = sum(r.tokens - 1 for r in last) / max(1, rounds)
            progress.update(task, completed=len(stream.records), tau=tau, swaps=stream.swaps)

        def save() -> None:
            folder.save(stream, out)
            last = stream.events[-1:]
            if last and last[0].after == len(stream.records):
                progress.console.print(_sentence(last[0].decision, last[0].after))

        stream.run(save=save, on_prompt=on_prompt)


def _sentence(d: dict[str, Any], after: int) -> str:
    what = {
        "swapped": "the updated drafter takes over",
        "kept": "undecided, the update learns on",
        "reset": f"the update is thrown away, learning rate {d['lr']:.2g}",
    }[d["decision"]]
    return (
        f"  prompt {after}: {d['serving']:.3f} -> {d['shadow']:.3f} accepted drafts a token on "
        f"{d['prompts']} prompts (gain {d['gain']:+.4f}, standard error {d['error']:.4f}): {what}"
    )


def _finish(cfg: DictConfig, run: Run, stream: Stream, out: Path) -> None:
    """Write what is known at the end, and say the most important of it."""
    caption = (
        f"{'+'.join(dict.fromkeys(a.bench for a in stream.asked))}: {len(stream.asked)} prompts, "
        f"{sum(r.tokens for r in stream.records)} tokens, T={cfg.temperature:g}, update every "
        f"{cfg.interval} prompts, judged on {cfg.window}, seed {cfg.seed}"
    )
    found = folder.finish(out, stream, run, caption=caption)
    decisions = ", ".join(f"{count} {name}" for name, count in found["decisions"].items())
    say(f"Updates: {decisions}. {online_tau(stream.records)} tokens per step while learning.")
    half = found["parts"]["second_half"]
    if "gain" in half:
        gain = "{value:.3f} [{low:.3f}, {high:.3f}]".format(**half["gain"])
        say(f"Second half of the stream: {gain} times the tokens per step of the first drafter.")
    say(f"Written: {out / 'online.json'}, online.png and drafter/")


@hydra.main(version_base=None, config_path="pkg://conf", config_name="online")
def _command(cfg: DictConfig) -> None:
    with friendly_errors():
        online(cfg)


def main() -> None:
    """The command."""
    _command()


if __name__ == "__main__":
    main()
