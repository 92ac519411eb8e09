"""Settings: defaults, recipes, overrides, and errors that say what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dmx.config import (
    BatchConfig,
    Config,
    from_tree,
    leaves,
    overrides,
    recipe,
    recipe_names,
    to_tree,
    with_absolute_paths,
)
from dmx.errors import DmxError


def test_defaults_are_the_papers_recipe() -> None:
    config = Config()
    assert (config.model.backbone, config.data.height, config.data.width) == ("resnet50", 256, 128)
    assert (config.batch.identities, config.batch.instances) == (16, 4)
    assert (config.optim.lr, config.optim.weight_decay) == (3.5e-4, 5e-4)
    assert (config.schedule.epochs, config.schedule.steps_per_epoch) == (60, 2000)
    assert config.schedule.stage_two_epoch == 30
    assert config.compat == "fixed"


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_hold_only_differences(name: str) -> None:
    default = leaves_of(Config())
    changed = leaves_of(from_tree(recipe(name)))
    written = leaves_of_tree(recipe(name)[1])
    assert written, "a recipe without settings"
    for key, value in written.items():
        assert changed[key] != default[key] or value is None, f"{name}: {key} repeats the default"


def leaves_of(config: Config) -> dict[str, object]:
    return leaves_of_tree(to_tree(config))


def leaves_of_tree(tree: dict[str, object], prefix: str = "") -> dict[str, object]:
    known = leaves()
    flat: dict[str, object] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and prefix + key not in known:
            flat |= leaves_of_tree(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def test_later_layers_win_and_values_are_converted() -> None:
    config = from_tree(
        ("a", {"optim": {"lr": 1}, "schedule": {"milestones": [1, 2]}}),
        overrides(["optim.lr=1e-4", "data.tests=[x, y]", "batch.source_share=null"]),
    )
    assert config.optim.lr == 1e-4
    assert config.schedule.milestones == (1, 2)
    assert config.data.tests == ("x", "y")
    assert config.batch.source_share is None


def test_resolved_configuration_reads_back(tmp_path: Path) -> None:
    config = from_tree(recipe("domainmix-official"), overrides(["model.backbone_args={channels: [8, 16]}"]))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(to_tree(config)))
    assert from_tree(recipe(str(path))) == config


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["optim.lrr=1"], "did you mean optim.lr"),
        (["optim.lr=fast"], "optim.lr wants a number"),
        (["batch.identities=2.5"], "wants a whole number"),
        (["batch.identities=1"], "at least 2"),
        (["cluster.eps=1.5"], "between 0 and 1"),
        (["compat=broken"], "official or fixed"),
        (["lr"], "name=value"),
        (["schedule.milestones=3"], "wants a list"),
        (["schedule.milestones=[3, -1]"], "at least 0, found -1"),
        (["cluster.eps=0"], "--set: cluster.eps: wanted a number between 0 and 1, both excluded, found 0.0"),
        (["cluster.eps=1"], "both excluded, found 1.0"),
        (["cluster.eps=0.98"], "--set: cluster.eps_gap: .* eps [+] eps_gap < 1, found 0.98 and 0.02"),
        (["cluster.eps=0.3", "cluster.eps_gap=0.3"], "found 0.3 and 0.3"),
        (["schedule.source_epochs=31"], "stage_two_epoch 30 lies within the first 31 epochs"),
        (
            ["schedule=3"],
            r"schedule is a section and takes no value, found 3; its settings are schedule.epochs,",
        ),
        (["seed=3", "seed.x=1"], "seed the value 3 and sets seed.x"),
        (["seed.x=1", "seed=3"], "seed the value 3 and sets seed.x"),
        (["seed=3", "seed.x.y=1"], "seed the value 3 and sets seed.x.y"),
        (["seed.x=1"], "seed wants a whole number"),
    ],
)
def test_errors_name_the_setting(items: list[str], message: str) -> None:
    with pytest.raises(DmxError, match=message):
        from_tree(overrides(items))


def test_unknown_recipe_names_the_known_ones() -> None:
    with pytest.raises(DmxError, match="domainmix"):
        recipe("nothing")


def test_official_has_no_domain_quota() -> None:
    assert from_tree(("x", {"compat": "official"})).batch.source_share is None


@pytest.mark.parametrize("share", [0.5, 0.3])
def test_a_domain_quota_is_no_setting_of_official(share: float) -> None:
    """Also when it is the default, and wherever it was asked for: dropped in silence, it would mislead."""
    layer = ("mine.yaml", {"batch": {"source_share": share}})
    with pytest.raises(
        DmxError, match=rf"mine.yaml, x: batch.source_share is {share} and compat is official"
    ):
        from_tree(layer, ("x", {"compat": "official"}))
    assert (
        from_tree(("x", {"compat": "official", "batch": {"source_share": None}})).batch.source_share is None
    )
    with pytest.raises(DmxError, match="source_share"):
        Config(compat="official", batch=BatchConfig(source_share=0.3))


def test_overrides_of_one_mapping_are_joined() -> None:
    items = ["model.backbone_args.a=1", "model.backbone_args={b: 2}", "model.backbone_args.c=3"]
    for given in (items, items[::-1]):
        assert from_tree(overrides(given)).model.backbone_args == {"a": 1, "b": 2, "c": 3}
    sections = from_tree(overrides(["optim={lr: 1}", "optim.clip_norm=2", "optim={lr: 3}"])).optim
    assert (sections.lr, sections.clip_norm) == (3, 2)


def test_relative_paths_start_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = overrides(["data.source=a", "data.tests=[b, /c, 'gs://d/e']", "model.weights=w.pth"])
    config = with_absolute_paths(from_tree(given))
    assert config.data.source == str(tmp_path / "a")
    assert config.data.target is None
    assert config.data.tests == (str(tmp_path / "b"), "/c", "gs://d/e")
    assert config.model.weights == str(tmp_path / "w.pth")
    assert with_absolute_paths(config) == config
