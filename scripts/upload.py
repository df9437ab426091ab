"""A finished drafter, with its card and its numbers, to the Hugging Face Hub.

python -m scripts.upload run=runs/eagle3/latest repo=me/draft-eagle3 dry_run=true
python -m scripts.upload run=runs/eagle3/latest repo=me/draft-eagle3 \
    license=apache-2.0 target_license=apache-2.0 data_license='MIT, CC-BY-SA-3.0'

Private unless private=false. What goes is gathered in <run>/upload/ and looked at first: secrets,
training data and copies of the target's weights are refused. The token is that of `hf auth login`
or of HF_TOKEN. Run it again after an interruption: files that arrived are not sent again, and what
is there already makes no new commit.
"""

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import hydra
import torch
from huggingface_hub import HfApi
from omegaconf import DictConfig
from safetensors import safe_open

from conf.check import friendly_errors
from conf.console import say
from models.run import Run, open_run
from models.target import Target
from scripts.upload_card import Licences, upload_card

STAGED = "upload"
KINDS = {".json", ".safetensors", ".md", ".csv", ".png", ".txt", ".yaml", ".jinja", ".gguf"}
"""Kinds of files that a drafter, an export and a card are made of."""
DATA = re.compile(r"(tokens|features|topk\d*|sampled\d*)-\d+\.|respond\.jsonl|prompts\.jsonl")
SECRETS = {
    "a Hub token": rb"hf_[A-Za-z0-9]{30,}",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "an AWS key": rb"\bAKIA[0-9A-Z]{16}\b",
    "a GitHub token": rb"\bgh[pousr]_[A-Za-z0-9]{36,}",
    "an API key": rb"\bsk-[A-Za-z0-9_-]{32,}",
    "a Slack token": rb"\bxox[abprs]-[A-Za-z0-9-]{10,}",
    "a W&B key": rb"(?i)wandb_api_key\W{1,4}[0-9a-f]{40}",
}


@dataclass(frozen=True)
class Upload:
    """What a command asks for."""

    run: Run
    repo: str
    folder: Path
    licences: Licences
    private: bool = True
    target_weights: bool = False

    def stage(self) -> Path:
        """Everything that would go, gathered and looked at. Raises ValueError for what must not."""
        staged = self.run.path / STAGED
        shutil.rmtree(staged, ignore_errors=True)
        shutil.copytree(self.folder, staged)
        for name in ("metrics.csv", "rank_accuracy.json"):
            if (self.run.path / name).is_file():
                shutil.copy(self.run.path / name, staged / name)
        for file in self.run.path.glob("decode/*/results.json"):
            shutil.copy(file, staged / f"results-{file.parent.name}.json")
        card = staged / "README.md"
        # Beside a drafter lies what huggingface_hub writes into every folder: it says nothing.
        exported = self.folder != self.run.drafter_folder and card.is_file()
        known = card.read_text() if exported else None
        card.write_text(upload_card(self.run, self.licences, known))
        problems = list(self._problems(staged))
        if problems:
            shutil.rmtree(staged)
            raise ValueError(
                f"Nothing is uploaded to {self.repo}, because of:\n  - "
                + "\n  - ".join(problems)
                + "\nTake these out of the folder (or, for matrices of the target that an engine "
                "needs beside the drafter, say target_weights=true and mind its licence)."
            )
        return staged

    def send(self, staged: Path) -> str:
        """Create the repository when it is missing, and commit; returns the commit's address."""
        api = HfApi()
        api.create_repo(self.repo, private=self.private, exist_ok=True)
        done = api.upload_folder(
            repo_id=self.repo,
            folder_path=staged,
            commit_message=f"Drafter of {self.run.path.name}",
        )
        shutil.rmtree(staged)
        return str(done.commit_url)

    def _problems(self, staged: Path) -> Iterator[str]:
        for path in sorted(p for p in staged.rglob("*") if p.is_file()):
            name = path.relative_to(staged).as_posix()
            if DATA.search(name) or path.suffix not in KINDS:
                yield f"{name}: training data, or no file of a drafter (expected {_kinds()})"
                continue
            if path.suffix not in (".safetensors", ".gguf", ".png"):
                content = path.read_bytes()
                for what, pattern in SECRETS.items():
                    if re.search(pattern, content):
                        yield f"{name}: holds {what}"
        weights = list(staged.rglob("*.safetensors"))
        if weights and not self.target_weights:
            yield from _copies(weights, self.run.load_target())


def _kinds() -> str:
    return ", ".join(sorted(KINDS))


def _copies(files: list[Path], target: Target) -> Iterator[str]:
    """Tensors that are the target's own, to the bf16 bit."""
    by_shape: dict[tuple[int, ...], list[tuple[str, torch.Tensor]]] = {}
    for name, weight in target.model.state_dict().items():
        if weight.ndim >= 2:
            by_shape.setdefault(tuple(weight.shape), []).append((name, weight))
    for file in files:
        with safe_open(file, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118  (it is no dictionary)
                shape = tuple(content.get_slice(name).get_shape())
                for theirs, weight in by_shape.get(shape, []):
                    ours = content.get_tensor(name).to(torch.bfloat16)
                    if torch.equal(ours, weight.cpu().to(torch.bfloat16)):
                        yield f"{file.name}: its tensor '{name}' is the target's '{theirs}'"


def upload(cfg: DictConfig) -> str | None:
    """Send it; returns the commit's address (None when nothing was sent)."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", cfg.repo):
        raise ValueError(
            f"repo={cfg.repo} should be <owner>/<name>, as the Hub writes it; give both."
        )
    run = open_run(cfg.run)
    folder = run.drafter_folder if cfg.folder is None else run.path / cfg.folder
    if not folder.is_dir():
        raise ValueError(
            f"folder={cfg.folder} is not in {run.path}, expected an export; make it with "
            f"python -m export run={cfg.run} exporter=hf."
        )
    job = Upload(
        run=run,
        repo=cfg.repo,
        folder=folder,
        licences=Licences(cfg.license, cfg.target_license, cfg.data_license),
        private=cfg.private,
        target_weights=cfg.target_weights,
    )
    staged = job.stage()
    files = sorted(p for p in staged.rglob("*") if p.is_file())
    seen = "private" if cfg.private else "public"
    say(f"To {cfg.repo} ({seen}), {sum(p.stat().st_size for p in files) / 1e6:.2f} MB:")
    for path in files:
        say(f"  {path.stat().st_size:>12,}  {path.relative_to(staged).as_posix()}")
    if cfg.dry_run:
        shutil.rmtree(staged)
        say("dry_run=true: nothing was sent.")
        return None
    where = job.send(staged)
    say(f"Uploaded: {where}")
    return where


@hydra.main(version_base=None, config_path="pkg://conf", config_name="upload")
def main(cfg: DictConfig) -> None:
    """Entry point."""
    with friendly_errors():
        upload(cfg)


if __name__ == "__main__":
    main()
