"""Every kind of config mistake gives one sentence, before anything is loaded."""

from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf

from conf.check import ConfigError, build, check, friendly_errors
from models.drafter.hydra_heads import HydraHeads

OWN = {"_target_": "models.head.own.OwnHead"}
MEDUSA = {"_target_": "models.drafter.medusa.Medusa", "head": OWN}


def problems(node: dict[str, Any]) -> list[str]:
    """What check says about a config with one node, without the heading."""
    try:
        check(OmegaConf.create({"x": node}))
    except ConfigError as error:
        return [line.removeprefix("  - ") for line in str(error).splitlines()[1:]]
    return []


def test_a_right_config_passes() -> None:
    assert problems({**MEDUSA, "num_heads": 3, "draft_vocab_size": None}) == []
    assert problems({"_target_": "torch.optim.AdamW", "lr": 1, "betas": [0.9, 0.95]}) == []
    assert (
        problems({"_target_": "lightning.Trainer", "devices": 1, "precision": "bf16-mixed"}) == []
    )


def test_a_misspelt_key_names_the_right_one() -> None:
    assert problems({**MEDUSA, "num_head": 3}) == [
        "x.num_head: models.drafter.medusa.Medusa has no argument 'num_head'; "
        "did you mean 'num_heads'?"
    ]


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("num_heads", "three", "x.num_heads=three: should be a valid integer"),
        ("num_heads", "3", "x.num_heads=3: should be a valid integer"),
        ("num_heads", True, "x.num_heads=true: should be a valid integer"),
        ("num_heads", None, "x.num_heads=null: should be a valid integer"),
        ("num_heads", 1.5, "x.num_heads=1.5: should be a valid integer"),
        ("head", "own", "x.head=own: should be a mapping"),
    ],
)
def test_a_wrong_type_is_named(key: str, value: Any, complaint: str) -> None:
    (line,) = problems({**MEDUSA, key: value})
    assert line.startswith(complaint)


def test_a_wrong_choice_lists_the_choices() -> None:
    (line,) = problems({"_target_": "models.target.load_target", "name": "x", "dtype": "bf16"})
    assert "x.dtype=bf16: should be 'auto', 'float32', 'bfloat16' or 'float16'" in line


def test_a_missing_argument_is_named_unless_the_command_supplies_it() -> None:
    (line,) = problems({"_target_": "models.drafter.medusa.Medusa"})  # sizes come from the target
    assert line.startswith("x.head is missing")
    node = OmegaConf.create({"x": {"_target_": "models.target.load_target"}})
    with pytest.raises(ConfigError, match=r"x\.name is missing"):
        check(node)
    check(node, runtime={"name"})


def test_library_nodes_are_checked_too() -> None:
    assert "has no argument 'max_epoch'; did you mean 'max_epochs'?" in str(
        problems({"_target_": "lightning.Trainer", "max_epoch": 3})
    )
    assert problems({"_target_": "torch.optim.AdamW", "lr": "fast", "_partial_": True})[
        0
    ].startswith("x.lr=fast: should be a valid number")


def test_nested_objects_must_be_of_the_class_the_argument_asks_for() -> None:
    logger = {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": "logs"}
    assert problems({"_target_": "lightning.Trainer", "logger": [logger]}) == []
    (line,) = problems({"_target_": "lightning.Trainer", "callbacks": logger})
    assert "Callback" in line
    assert "not a CSVLogger" in line


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("os.system", "outside of what a config may call"),
        ("torch.os.system", "does not exist"),  # reachable through torch, but not torch's
        ("models.drafter.medusa.Medua", "does not exist"),
        ("models.drafter.medua.Medusa", "does not exist"),
    ],
)
def test_a_target_is_ours_or_a_named_library_s(path: str, reason: str) -> None:
    (line,) = problems({"_target_": path})
    assert reason in line
    with pytest.raises(ConfigError, match=reason):
        build({"_target_": path})


def test_all_problems_come_at_once() -> None:
    cfg = OmegaConf.create(
        {"drafter": {**MEDUSA, "num_head": 3, "num_layers": "two"}, "name": "???", "run": "${no.x}"}
    )
    with pytest.raises(ConfigError) as caught:
        check(cfg)
    text = str(caught.value)
    assert "4 problems" in text
    for part in ("drafter.num_head:", "drafter.num_layers=two", "name has no value", "run cannot"):
        assert part in text


def test_build_passes_runtime_values_only_where_they_are_named() -> None:
    node = OmegaConf.create(
        {
            "_target_": "models.drafter.hydra_heads.HydraHeads",
            "num_heads": 2,
            "hidden_size": 4,
            "head": OWN,
        }
    )
    drafter = build(node, hidden_size=8, vocab_size=20, target_shape={}, unrelated=1)
    assert isinstance(drafter, HydraHeads)
    assert drafter.hidden_size == 4  # the node's own value wins
    assert drafter.vocab_size == 20


def test_build_keeps_a_drafter_s_head_as_data_so_that_it_can_be_saved() -> None:
    node = OmegaConf.create(MEDUSA)
    drafter = build(node, hidden_size=4, vocab_size=20)
    assert drafter._hub_mixin_config["head"] == OWN
    assert type(drafter._hub_mixin_config["head"]) is dict


def test_build_makes_sub_nodes_and_partials_with_plain_lists() -> None:
    optimizer = build(
        OmegaConf.create({"_target_": "torch.optim.AdamW", "betas": [0.5, 0.75], "_partial_": True})
    )
    assert optimizer.keywords == {"betas": [0.5, 0.75]}
    assert type(optimizer.keywords["betas"]) is list
    made = optimizer([torch.nn.Parameter(torch.ones(1))])
    assert made.defaults["betas"] == (0.5, 0.75)
    nested = build(OmegaConf.create({"a": [{"_target_": "torch.nn.ReLU"}, 3]}))
    assert isinstance(nested["a"][0], torch.nn.ReLU)
    assert nested["a"][1] == 3


def test_friendly_errors_prints_one_sentence_and_exits_with_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught, friendly_errors():
        raise ValueError("The target 'x' has [3] layers.")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: The target 'x' has [3] layers.\n"


def test_friendly_errors_leaves_our_own_mistakes_alone() -> None:
    with pytest.raises(AssertionError), friendly_errors():
        raise AssertionError("ours")


def composed(*overrides: str) -> DictConfig:
    with initialize_config_module("conf", version_base=None):
        return compose("export", overrides=list(overrides))


def test_root_keys_and_scalars_are_checked_while_composing() -> None:
    composed("texts=3")
    for override in ("texts=many", "sed=1", "exporter.dtyp=x"):
        with pytest.raises(ConfigCompositionException, match="override"):
            composed(override)
    with pytest.raises(ConfigError, match=r"outt: there is no such key; did you mean 'out'\?"):
        check(composed("+outt=1"))


@pytest.mark.parametrize("family", ["medusa", "hydra_heads"])
@pytest.mark.parametrize("head", ["own", "frozen"])
def test_drafter_and_head_groups_combine(family: str, head: str) -> None:
    with initialize_config_module("conf", version_base=None):
        cfg = compose("drafter/" + family, overrides=[f"head@drafter.head={head}"])
    assert cfg.drafter.head._target_.startswith(f"models.head.{head}.")
    check(cfg)
