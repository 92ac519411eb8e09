"""The tables of `generalisation.py`: ways, roles and switches."""

from __future__ import annotations

import statistics
from typing import Any

from cells import head, line, spread

from dmx.config import leaves

WITHOUT, METHOD, BOUND = "synthetic only", "DomainMix", "true labels"
WAYS = {
    WITHOUT: "synthetic only",
    "pseudo-labels": "and pseudo-labels, without the game",
    METHOD: "DomainMix",
    BOUND: "DomainMix with true labels of the unlabelled set",
}
TESTS = ("unseen", "second")
METRICS = {"map": "mAP", "rank1": "rank-1", "minp": "mINP"}

Runs = dict[int, dict[str, Any]]  # by seed


def generalisation(results: dict[str, Any]) -> str:
    """The ways on both unseen styles, in the role that the sizes were chosen for."""
    by_way = ways_of(results, results["claim"])
    named = by_way[METHOD]
    styles, first = styles_of(named), next(iter(named.values()))
    titles = (f"{styles[test]}: {metric}" for test in TESTS for metric in METRICS.values())
    lines = head("trained on", *titles, texts=1)
    for way, runs in by_way.items():
        cells = [
            spread(run["tests"][test][metric] for run in runs.values())
            for test in TESTS
            for metric in METRICS
        ]
        lines.append(line(WAYS[way], *cells))
    gains = " and ".join(f"{gain(by_way, test)} mAP on {styles[test]}" for test in TESTS)
    shares = " and ".join(way_gone(by_way, test) for test in TESTS)
    lines += [
        "",
        f"Mean ± standard deviation in percent over {len(named)} seeds, {first['steps']} steps of equally "
        f"many images each; {styles['labelled']} is labelled, {styles['unlabelled']} is not. Seed by seed, "
        f"DomainMix gains {gains} over synthetic only; its means are {shares} of the way to those of true "
        "labels. A seed is also that of the people and cameras of every set, so ± holds how hard the tests "
        f"are. {machine(named)}",
    ]
    return "\n".join(lines)


def generalisation_roles(results: dict[str, Any]) -> str:
    """The mAP of every way with the styles in other roles."""
    lines = head("labelled", "unlabelled", "unseen", *WAYS, "gain", "of the way", "seeds", texts=3)
    for role in roles(results):
        by_way = ways_of(results, role)
        if not by_way[METHOD]:
            continue
        styles = styles_of(by_way[METHOD])
        for test in TESTS:
            cells = [spread(run["tests"][test]["map"] for run in runs.values()) for runs in by_way.values()]
            cells += [gain(by_way, test), way_gone(by_way, test), str(len(by_way[METHOD]))]
            lines.append(line(styles["labelled"], styles["unlabelled"], styles[test], *cells))
    lines += ["", "mAP in percent; the gain is DomainMix's over synthetic only, seed by seed."]
    return "\n".join(lines)


def generalisation_switches(results: dict[str, Any]) -> str:
    """What each switch changes, seed by seed, and what the last clustering was like; a table a role."""
    lines = []
    for role in roles(results):
        lines += _switches_in(results, role)
    lines += [
        "Change in mAP points against the way in which the switch was changed, seed by seed. Purity, and "
        "recall of pairs of one person, are those of the last clustering.",
    ]
    return "\n".join(lines)


def _switches_in(results: dict[str, Any], role: str) -> list[str]:
    """The lines of one role, a blank one behind them; none where no switch was tried."""
    tried = [
        row["way"] for row in results["runs"] if row["way"] not in WAYS and row["role"]["labelled"] == role
    ]
    if not tried:
        return []
    styles = styles_of(ways_of(results, role)[METHOD])
    titles = (title for test in TESTS for title in (f"{styles[test]}: mAP", "change"))
    columns = (f"{styles['labelled']} labelled", "in", "settings", *titles, "purity", "recall", "seeds")
    lines = head(*columns, texts=3)
    for way in dict.fromkeys([METHOD, *tried]):
        runs = runs_of(results, way, role)
        first = next(iter(runs.values()))
        base = runs_of(results, first["base"], role)
        cells = ["" if way == METHOD else first["base"]]
        cells += [", ".join(map(_written, first["settings"]))]
        for test in TESTS:
            cells += [spread(run["tests"][test]["map"] for run in runs.values())]
            cells += ["" if way == METHOD else differences(runs, base, test)]
        last = [run["clusters"][-1] for run in runs.values() if run["clusters"]]
        cells += [mean_share(last, "purity"), mean_share(last, "pair_recall"), str(len(runs))]
        lines.append(line(way, *cells))
    return [*lines, ""]


def _written(setting: str) -> str:
    """A setting as code; one that did not help and is gone says so."""
    return f"`{setting}`" if setting.partition("=")[0] in leaves() else f"{setting} (removed again)"


def generalisation_cameras(results: dict[str, Any]) -> str:
    """The mAP of the queries of each camera of the unseen style."""
    found: dict[tuple[str, int], list[float]] = {}
    for row in results["rows"]:
        found.setdefault((row["way"], row["camera"]), []).append(row["map"])
    ways = [way for way in WAYS if any(way == name for name, _ in found)]
    lines = head(f"camera of {results['style']}", *ways, "gain")
    for camera in sorted({camera for _, camera in found}):
        own = {way: found[way, camera] for way in ways}
        gains = [a - b for a, b in zip(own[METHOD], own[WITHOUT], strict=True)]
        cells = [spread(values) for values in own.values()]
        lines.append(line(camera, *cells, spread(gains, "+.1f")))
    seeds = len({row["seed"] for row in results["rows"]})
    lines += ["", f"Mean ± standard deviation in percent over {seeds} seeds."]
    return "\n".join(lines)


def roles(results: dict[str, Any]) -> list[str]:
    """The labelled styles, that of the claim first."""
    found = dict.fromkeys(run["role"]["labelled"] for run in results["runs"])
    return sorted(found, key=lambda labelled: labelled != results["claim"])


def ways_of(results: dict[str, Any], labelled: str) -> dict[str, Runs]:
    """The runs of every way in a role, with those seeds that all ways have."""
    found = {way: runs_of(results, way, labelled) for way in WAYS}
    shared = set.intersection(*(set(runs) for runs in found.values()))
    return {way: {seed: run for seed, run in runs.items() if seed in shared} for way, runs in found.items()}


def runs_of(results: dict[str, Any], way: str, labelled: str) -> Runs:
    """The runs of a way in a role, by seed.

    Raises:
        SystemExit: runs were made with several recipes, which no table compares.
    """
    recipes = {run["recipe"] for run in results["runs"]}
    if len(recipes) > 1:
        raise SystemExit(
            f"wanted runs of one recipe, found {len(recipes)}: run benchmarks/generalisation.py again with "
            "the same seeds, roles and switches"
        )
    return {
        run["seed"]: run
        for run in results["runs"]
        if (run["way"], run["role"]["labelled"]) == (way, labelled)
    }


def styles_of(runs: Runs) -> dict[str, str]:
    """Which style has which part in a role."""
    if not runs:
        raise SystemExit("wanted a seed that every way was trained with, found none: run generalisation.py")
    styles: dict[str, str] = next(iter(runs.values()))["role"]
    return styles


def gain(by_way: dict[str, Runs], test: str) -> str:
    """mAP points over synthetic only."""
    return differences(by_way[METHOD], by_way[WITHOUT], test)


def way_gone(by_way: dict[str, Runs], test: str) -> str:
    """Share of the way from synthetic only to true labels, of means; empty where that leads nowhere."""
    least, found, most = (
        statistics.mean(run["tests"][test]["map"] for run in by_way[way].values())
        for way in (WITHOUT, METHOD, BOUND)
    )
    return f"{(found - least) / (most - least):.0%}" if most > least else ""


def differences(runs: Runs, base: Runs, test: str) -> str:
    """Change in mAP points, seed by seed."""
    pairs = [(runs[seed], base[seed]) for seed in runs if seed in base]
    return spread((a["tests"][test]["map"] - b["tests"][test]["map"] for a, b in pairs), "+.1f")


def mean_share(rows: list[dict[str, Any]], name: str) -> str:
    """In percent; empty where there is none."""
    return f"{statistics.mean(row[name] for row in rows):.0%}" if rows else ""


def machine(runs: Runs) -> str:
    """Where it ran, and how long the quickest run took there: what else the machine did slows the others."""
    minutes = min(run["seconds"] for run in runs.values()) / 60
    about = next(iter(runs.values()))["machine"]
    where = about["gpu"] or f"{about['cores']} cores of an {about['cpu']}"
    beside = f", {about['jobs']} of them side by side," if about["jobs"] > 1 else ""
    return f"A run took at least {minutes:.0f} minutes{beside} on {where}."
