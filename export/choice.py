"""Which exporters can write a drafter: every one is asked, so that none is listed by hand."""

from importlib import resources

from hydra.utils import get_class
from omegaconf import OmegaConf

from export.base import Exporter
from models.drafter.base import Drafter


def all_exporters() -> list[Exporter]:
    """One of each exporter in conf/exporter, with the settings written there."""
    made = []
    for file in sorted(resources.files("conf").joinpath("exporter").iterdir(), key=str):
        if file.name.endswith(".yaml"):
            node = OmegaConf.create(file.read_text())
            arguments = {str(k): v for k, v in node.items() if k not in ("_target_", "defaults")}
            made.append(get_class(node._target_)(**arguments))
    return made


def able(drafter: Drafter) -> list[str]:
    """Names of the exporters that do not refuse this drafter."""
    names = []
    for exporter in all_exporters():
        try:
            exporter.refuse(drafter)
        except ValueError:
            continue
        names.append(exporter.name)
    return names


def refuse(exporter: Exporter, drafter: Drafter) -> None:
    """Raise the exporter's own sentence, and say which ones can write the drafter."""
    try:
        exporter.refuse(drafter)
    except ValueError as error:
        others = ", ".join(f"exporter={name}" for name in able(drafter))
        raise ValueError(f"{error} As it is, it can be written with {others}.") from error
