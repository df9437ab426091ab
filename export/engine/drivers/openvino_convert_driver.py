"""A plain transformers folder as an OpenVINO IR, by optimum-intel.

Asked: `source`, `out` (a folder that does not exist yet), `weights` (fp32 or fp16) and, for
EAGLE-3, `layers`: the layers whose outputs the drafter reads, as OpenVINO GenAI takes them from the
IR ("1 14 26"; a string, because it refuses a list). Without them it takes layers of its own, which
are off by one against every other engine.
"""

import json
import sys
from pathlib import Path

from openvino import Core, save_model  # type: ignore
from optimum.commands.optimum_cli import main as optimum_cli  # type: ignore[import-not-found]

NAME = "openvino_model"


def main() -> None:
    """Read the request, write the answer."""
    asked = json.loads(Path(sys.argv[1]).read_text())
    out = Path(asked["out"])
    # EAGLE-3's class comes with optimum-intel and is loaded as remote code would be.
    own_class = ["--trust-remote-code"] if asked["layers"] else []
    answer = Path(sys.argv[2])
    sys.argv[1:] = [
        *("export", "openvino", "-m", asked["source"], "--task", "text-generation-with-past"),
        *("--weight-format", asked["weights"], *own_class, str(out)),
    ]
    optimum_cli()
    if asked["layers"]:
        _name_layers(out, asked["layers"])
        _forget_paths(out / "config.json")
    answer.write_text("{}")


def _name_layers(out: Path, layers: str) -> None:
    model = Core().read_model(out / f"{NAME}.xml")
    model.set_rt_info(layers, ["hidden_layers_list"])
    # The weights are mapped from the file that is replaced, so a new one is written first.
    save_model(model, out / "new.xml", compress_to_fp16=False)
    del model
    for suffix in (".xml", ".bin"):
        (out / f"new{suffix}").replace(out / f"{NAME}{suffix}")


def _forget_paths(file: Path) -> None:
    """config.json names the class by its place on this machine."""
    config = json.loads(file.read_text())
    config.pop("auto_map", None)
    file.write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
