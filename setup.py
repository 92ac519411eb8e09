"""Maps the repository's folders to packages; everything else stands in pyproject.toml."""

from setuptools import setup

setup(
    packages=[
        "dmx",
        "dmx.cluster",
        "dmx.cluster.sharded",
        "dmx.commands",
        "dmx.data",
        "dmx.data.layouts",
        "dmx.deployment",
        "dmx.doctor",
        "dmx.evaluation",
        "dmx.extraction",
        "dmx.kernels",
        "dmx.kernels.cpu",
        "dmx.model",
        "dmx.recipes",
        "dmx.report",
        "dmx.search",
        "dmx.synth",
        "dmx.train",
        "dmx.video",
    ],
    package_dir={"dmx.kernels": "kernels", "dmx.cluster": "cluster"},
    package_data={
        "dmx": ["py.typed", "page.css"],
        "dmx.recipes": ["*.yaml"],
        "dmx.report": ["report.css", "report.js"],
    },
)
