"""Models by their name on the Hugging Face hub: weights without pickles, kept by its own cache."""

from __future__ import annotations

import re
from pathlib import Path

from dmx.errors import DmxError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
WANTED = ("model.safetensors", "config.yaml")


def local_folder(path: str | Path) -> Path:
    """The folder of a model: `path` itself where there is one, else what the hub has by that name.

    `runs/first` is a path, and nobody is asked for it, where there is a folder `runs`.

    Raises:
        DmxError: there is neither, or the hub cannot be reached.
    """
    if Path(path).exists() or not HUB_ID.fullmatch(str(path)) or Path(path).parent.exists():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(str(path), allow_patterns=list(WANTED)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise DmxError(
            f"{path}: wanted a folder, or a model of this name on the Hugging Face hub, found no such "
            f"folder, and the hub gave none: {str(error).splitlines()[0]}. Give the path of a run or an "
            "export, or set HF_HUB_OFFLINE=1 to take what was downloaded before"
        ) from error
    missing = [name for name in WANTED if not (folder / name).exists()]
    if missing:
        raise DmxError(
            f"{path}: wanted a model that `dmx export` wrote, found one on the Hugging Face hub without "
            f"{' and '.join(missing)}"
        )
    return folder
