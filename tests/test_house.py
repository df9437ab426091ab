"""The house's own rules: one idea has one name everywhere, and the README's commands exist."""

import importlib
import importlib.metadata
import inspect
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

import decode.__main__
import export.__main__
import train.run
from conf.check import RUNTIME_NAMES, check
from models.drafter.base import Drafter
from models.head import Head

ROOT = Path(__file__).parents[1]
PACKAGES = ("conf", "models", "data_prep", "decode", "train", "export")
SUPPLIED = {
    "train": train.run.SUPPLIED,
    "decode": decode.__main__.SUPPLIED,
    "export": export.__main__.SUPPLIED,
}
SHARED = {"__init__", "base", "blocks", "load"}
"""Files under models/drafter and models/head that are no family of their own."""


def names(folder: str, suffix: str) -> set[str]:
    return {f.stem for f in (ROOT / folder).glob(f"*{suffix}")} - SHARED


@pytest.mark.parametrize(("group", "base"), [("drafter", Drafter), ("head", Head)])
def test_one_yaml_one_module_one_class(group: str, base: type) -> None:
    assert names(f"conf/{group}", ".yaml") == names(f"models/{group}", ".py")
    for name in names(f"models/{group}", ".py"):
        module = importlib.import_module(f"models.{group}.{name}")
        own = [
            c
            for _, c in inspect.getmembers(module, inspect.isclass)
            if issubclass(c, base) and c.__module__ == module.__name__
        ]
        assert len(own) == 1, f"models/{group}/{name}.py defines {own}, expected one {base}"
        node = OmegaConf.load(ROOT / "conf" / group / f"{name}.yaml")
        assert node._target_ == f"{module.__name__}.{own[0].__name__}"


def test_every_family_has_a_test_of_its_own_maths() -> None:
    families = names("models/drafter", ".py")
    tested = {f.stem.removeprefix("test_") for f in (ROOT / "tests/models/drafter").glob("test_*")}
    assert families <= tested


def test_every_config_group_member_says_what_it_is() -> None:
    for file in (ROOT / "conf").rglob("*.yaml"):
        assert file.read_text().startswith("#"), f"{file} does not start with a comment"


@pytest.mark.parametrize("package", PACKAGES)
def test_our_package_names_belong_to_us_alone(package: str) -> None:
    owners = set(importlib.metadata.packages_distributions().get(package, []))
    assert owners <= {"draftsmith"}, f"another distribution installs a package '{package}'"


def tracked_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout, so what belongs to the repository is unknown")
    return [f for f in (ROOT / line for line in listed.stdout.splitlines()) if f.is_file()]


def test_no_file_names_a_place_on_one_machine() -> None:
    pattern = re.compile(r"(?<![\w.~}\"'/-])/(home|root|work|mnt|Users)/\w")
    for file in tracked_files():
        if file.suffix in {".py", ".md", ".yaml", ".toml", ".txt", ".sh", ""}:
            found = pattern.search(file.read_text(errors="replace"))
            assert found is None, f"{file} names {found.group()}..."


def documented_commands() -> list[str]:
    """Each `python -m <command> ...` line in a bash block of the README."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [
        shlex.join(shlex.split(line, comments=True))
        for line in lines
        if line.startswith("python -m ")
    ]


@pytest.mark.parametrize("line", documented_commands())
def test_documented_commands_compose_and_check(line: str) -> None:
    _, _, module, *arguments = shlex.split(line)
    overrides = [a for a in arguments if "=" in a]  # the rest are Hydra's own options
    folder, _, name = module.rpartition(".")
    # It may register what its config refers to.
    importlib.import_module(module if folder else f"{module}.__main__")
    with initialize_config_module("conf", version_base=None):
        cfg = compose(name, overrides=overrides)
    check(cfg, runtime=SUPPLIED.get("decode" if folder else name, RUNTIME_NAMES))


@pytest.mark.parametrize("command", ["draft-data", "draft-train", "draft-decode", "draft-export"])
def test_console_scripts_point_at_a_main(command: str) -> None:
    project = (ROOT / "pyproject.toml").read_text()
    found = re.search(rf'^{command} = "([\w.]+):main"$', project, flags=re.MULTILINE)
    assert found is not None
    assert callable(importlib.import_module(found.group(1)).main)
