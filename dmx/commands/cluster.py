"""Cluster features into pseudo-identities: any features in Parquet, on one machine or many.

FEATURES is a Parquet file or a folder of them, locally or in an object store: what `dmx embed` writes, or any
other with a column of lists of numbers. OUT gets labels.parquet (row, key where there is one, and label: -1
for images that belong to no reliable cluster) and clusters.json (counts, settings, timings). The labels do
not depend on the number of workers. What images of one camera have in common can be kept out, where a column
`camera` of whole numbers tells the cameras. An interrupted job goes on with the same command; with
RAY_ADDRESS in the environment that Ray cluster is used, and OUT has to be seen by all of its hosts.

  dmx cluster features/market --out clusters/market
  dmx cluster s3://bucket/features --out /shared/clusters --workers 8 --eps 0.55
  dmx cluster features/market --out clusters/apart --centre-cameras true --same-camera-share 0.25
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from dmx.config import LAUNCHERS, Config, from_tree, overrides
from dmx.errors import DmxError
from dmx.sections import ClusterConfig

SUMMARY = "cluster features in Parquet into pseudo-identities, exactly, on one machine or many"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("features", metavar="FEATURES", help="Parquet file or folder: a local path or a URI")
    parser.add_argument("--out", required=True, type=Path, metavar="OUT", help="folder to write")
    parser.add_argument(
        "--column", help="column of the features (default: embedding, or the only one that holds lists)"
    )
    for item in _settings():
        default = "as suits the data" if item.default is None else item.default
        help_ = f"{item.metadata['help']} (default: {default})"
        parser.add_argument(_option(item.name), metavar=item.name.upper(), help=help_)
    parser.add_argument(
        "--independence-threshold",
        type=float,
        metavar="T",
        help="as clusters.json of an earlier clustering tells it (default: derived from these features)",
    )
    parser.add_argument(
        "--centroids", action="store_true", help="also write the unit mean of each pseudo-identity"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes (default: 1)")
    parser.add_argument(
        "--launcher", choices=LAUNCHERS, default="ray", help="who starts the processes (default: ray)"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=Config.timeout_s,
        metavar="S",
        help="how long a worker waits for the others, in seconds (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Cluster, or say what an earlier run has found."""
    given = {item.name: getattr(args, item.name) for item in _settings()}
    layers = [
        (_option(name), overrides([f"cluster.{name}={value}"])[1])
        for name, value in given.items()
        if value is not None
    ]
    config = from_tree(*layers, ("--timeout", {"timeout_s": args.timeout}))

    from dmx.clustering import RESULT, TASK, ClusterJob, read_cameras, remove_beginnings
    from dmx.features import Features
    from dmx.launching import check_launch, launch, remove_launches
    from dmx.stopping import say_at_the_end

    check_launch(args.launcher, args.workers)
    out, path = args.out, _absolute(args.features)
    features = Features(path, args.column)
    if len(features) == 0:
        raise DmxError(f"{args.features}: wanted at least one row, found none")
    if config.cluster.needs_cameras:
        read_cameras(features)  # what is wrong with them is said here, and not by every worker
    job = ClusterJob(
        path, args.column, features.fingerprint, config.cluster, args.independence_threshold, args.centroids,
        args.timeout,
    )  # fmt: skip
    job.write(out)
    say_at_the_end()
    if (out / RESULT).exists():
        remove_beginnings(out)
        remove_launches(out)
        print(f"{out} is finished")
    else:
        launch(
            TASK,
            {"folder": str(out.absolute())},
            folder=out,
            launcher=args.launcher,
            workers=args.workers,
            timeout_s=args.timeout,
        )
    print(_told(json.loads((out / RESULT).read_text(encoding="utf-8"))))
    return 0


def _settings() -> list[dataclasses.Field[Any]]:
    """Those of training, but for what is no clustering."""
    return [item for item in dataclasses.fields(ClusterConfig) if item.name != "labels"]


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _absolute(path: str) -> str:
    """Workers may start in another folder."""
    return path if "://" in path else str(Path(path).absolute())


def _told(result: dict[str, Any]) -> str:
    share = result["kept"] / result["rows"]
    threshold = result["independence_threshold"]
    return (
        f"{result['clusters']} pseudo-identities of {result['kept']} of {result['rows']} rows ({share:.0%}); "
        f"independence threshold {'none' if threshold is None else format(threshold, '.4f')}"
    )
