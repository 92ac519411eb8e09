"""What the tables of the claim say of numbers that are known."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
STYLES = {"labelled": "street", "unlabelled": "campus", "unseen": "mall", "second": "station"}
MAPS = {"synthetic only": 0.2, "pseudo-labels": 0.27, "DomainMix": 0.28, "true labels": 0.3}


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("generalisation_tables")
    sys.modules.pop("generalisation_tables", None)


def a_run(way: str, seed: int, at: float, **more: Any) -> dict[str, Any]:
    """Every metric has its own number, a hundredth more with every seed; the second style a tenth more."""
    metrics = {"map": at + seed / 100, "rank1": at + 0.05, "minp": at / 2}
    second = {name: value + 0.1 for name, value in metrics.items()}
    clusters = [
        {"epoch": 5, "purity": 0.5, "pair_recall": 0.4},
        {"epoch": 6, "purity": 0.9, "pair_recall": 0.8},
    ]
    return {
        "way": way, "base": way, "settings": [], "seed": seed, "role": STYLES, "steps": 1200,
        "seconds": 240.0, "tests": {"unseen": metrics, "second": second}, "clusters": clusters, "recipe": "a",
        "machine": {"cpu": "Z80", "cores": 2, "gpu": None, "jobs": 2}, **more,
    }  # fmt: skip


def results(*more: dict[str, Any]) -> dict[str, Any]:
    runs = [a_run(way, seed, at) for way, at in MAPS.items() for seed in (0, 1, 2)]
    return {"claim": "street", "runs": [*runs, *more]}


def test_the_claim_states_gain_and_share_of_the_way(tables: Any) -> None:
    text = tables.generalisation(results())
    assert (
        "| DomainMix | 29.0 ± 1.0 | 33.0 ± 0.0 | 14.0 ± 0.0 | 39.0 ± 1.0 | 43.0 ± 0.0 | 24.0 ± 0.0 |" in text
    )
    assert "DomainMix gains +8.0 ± 0.0 mAP on mall and +8.0 ± 0.0 mAP on station" in text
    assert "80% and 80% of the way" in text
    assert "A run took at least 4 minutes, 2 of them side by side, on 2 cores of an Z80." in text


def test_only_seeds_that_every_way_has_are_counted(tables: Any) -> None:
    """Seed 3 of one way alone changes nothing."""
    more = results(a_run("DomainMix", 3, 0.9))
    assert tables.generalisation(more) == tables.generalisation(results())
    assert "over 3 seeds" in tables.generalisation(more)


def test_no_share_of_a_way_that_leads_nowhere(tables: Any) -> None:
    runs = results()
    for run in runs["runs"]:
        if run["way"] == "true labels":
            run["tests"] = a_run("true labels", 0, 0.1)["tests"]
    text = tables.generalisation_roles(runs)
    assert "| +8.0 ± 0.0 |  | 3 |" in text


def test_runs_of_several_recipes_are_not_compared(tables: Any) -> None:
    with pytest.raises(SystemExit, match="wanted runs of one recipe, found 2"):
        tables.generalisation_switches(results(a_run("IBN-a", 0, 0.2, recipe="b")))


def test_without_a_seed_of_every_way_it_says_so(tables: Any) -> None:
    with pytest.raises(SystemExit, match="wanted a seed that every way was trained with"):
        tables.generalisation({"claim": "street", "runs": [a_run("DomainMix", 0, 0.2)]})


def test_roles_that_are_not_whole_are_left_out(tables: Any) -> None:
    other = STYLES | {"labelled": "campus", "unlabelled": "mall", "unseen": "street"}
    half = results(a_run("DomainMix", 0, 0.5, role=other))
    assert tables.generalisation_roles(half).count("\n|") == 3
    whole = results(*(a_run(way, 0, at, role=other) for way, at in MAPS.items()))
    text = tables.generalisation_roles(whole)
    assert "| campus | mall | street | 20.0 | 27.0 | 28.0 | 30.0 | +8.0 | 80% | 1 |" in text
    assert "| campus | mall | station | 30.0 | 37.0 | 38.0 | 40.0 | +8.0 | 80% | 1 |" in text
    assert text.index("| street | campus |") < text.index("| campus | mall |")


def test_switches_are_compared_seed_by_seed_with_their_own_way(tables: Any) -> None:
    """With seed 2 alone its own baseline counts, not the mean of all."""
    ibn = a_run("IBN-a", 2, 0.29, base="DomainMix", settings=["model.backbone=x"])
    bound = a_run("true labels, together", 0, 0.31, base="true labels")
    text = tables.generalisation_switches(results(ibn, bound))
    assert "| IBN-a | DomainMix | `model.backbone=x` | 31.0 | +1.0 | 41.0 | +1.0 | 90% | 80% | 1 |" in text
    assert "| true labels, together | true labels |  | 31.0 | +1.0 | 41.0 | +1.0 |" in text
    assert "| DomainMix |  |  | 29.0 ± 1.0 |  | 39.0 ± 1.0 |  |" in text


def test_a_switch_in_another_role_has_a_table_of_its_own(tables: Any) -> None:
    other = STYLES | {"labelled": "campus", "unlabelled": "mall", "unseen": "street"}
    whole = [a_run(way, 0, at, role=other) for way, at in MAPS.items()]
    ibn = a_run("IBN-a", 0, 0.29, base="DomainMix", role=other)
    text = tables.generalisation_switches(results(*whole, ibn))
    assert "street labelled" not in text
    assert text.startswith("| campus labelled | in | settings | street: mAP | change |")
    assert "| IBN-a | DomainMix |  | 29.0 | +1.0 | 39.0 | +1.0 | 90% | 80% | 1 |" in text
    both = tables.generalisation_switches(results(*whole, ibn, a_run("IBN-a", 2, 0.29, base="DomainMix")))
    assert both.index("street labelled") < both.index("campus labelled")


def test_cameras_are_means_over_seeds(tables: Any) -> None:
    rows = [
        {"way": way, "seed": seed, "camera": camera, "map": at + camera / 10 + seed / 100}
        for way, at in MAPS.items() for seed in (0, 1) for camera in (0, 1)
    ]  # fmt: skip
    text = tables.generalisation_cameras({"style": "mall", "rows": rows})
    assert "| 1 | 30.5 ± 0.7 | 37.5 ± 0.7 | 38.5 ± 0.7 | 40.5 ± 0.7 | +8.0 ± 0.0 |" in text
    assert "over 2 seeds" in text


def test_one_run_has_no_deviation(tables: Any) -> None:
    assert tables.spread([0.25]) == "25.0"
    assert tables.spread([0.1, 0.3]) == f"20.0 ± {100 * math.sqrt(0.02):.1f}"
