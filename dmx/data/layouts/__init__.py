"""One reader for each published layout, and recognising which one a folder is."""

from __future__ import annotations

from pathlib import Path

from dmx.data.layouts import generic, luperson, market, msmt17, randperson, unrealperson, webdataset
from dmx.data.layouts.base import Expected, Found, Layout, Options, Reading, Unreadable
from dmx.errors import DmxError

__all__ = ["LAYOUTS", "Expected", "Found", "Layout", "Options", "Reading", "Unreadable", "recognise"]

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for module in (market, msmt17, randperson, unrealperson, luperson, webdataset, generic)
    for layout in module.LAYOUTS
}
# Entries of a folder that an error message shows.
SHOWN_ENTRIES = 6


def _what_is_there(source: Path) -> str:
    if source.is_file():
        return f"a file of {source.stat().st_size} bytes"
    names = sorted(path.name + ("/" if path.is_dir() else "") for path in source.iterdir())
    if not names:
        return "an empty folder"
    more = f" and {len(names) - SHOWN_ENTRIES} more" if len(names) > SHOWN_ENTRIES else ""
    return ", ".join(names[:SHOWN_ENTRIES]) + more


def recognise(source: str | Path, layout: str = "auto") -> tuple[Layout, Path]:
    """Find out how a data set is laid out.

    Args:
        source: a folder, or an archive where a layout allows it.
        layout: a name of `LAYOUTS`, or `auto`.

    Returns:
        The layout and its root, which may lie inside `source`.

    Raises:
        DmxError: nothing there, an unknown name, no layout recognised, or more than one.
    """
    source = Path(source).expanduser()
    if not source.exists():
        raise DmxError(f"{source}: wanted a data set, found nothing of that name")
    if layout == "auto":
        return _recognise_by_itself(source)
    if layout not in LAYOUTS:
        raise DmxError(f"layout: wanted one of auto, {', '.join(LAYOUTS)}, found {layout!r}")
    chosen = LAYOUTS[layout]
    if source.is_file() and not chosen.reads_files:
        raise DmxError(f"{source}: wanted the folder of a {layout} data set, found a file; unpack it first")
    # Being told overrules the look of file names, so a root that was not recognised is read as it is.
    return chosen, chosen.find(source) or source


def _recognise_by_itself(source: Path) -> tuple[Layout, Path]:
    roots = {name: root for name, layout in LAYOUTS.items() if (root := layout.find(source)) is not None}
    published = {name: root for name, root in roots.items() if not LAYOUTS[name].generic}
    matches = published or roots
    if len(matches) == 1:
        name, root = next(iter(matches.items()))
        return LAYOUTS[name], root
    if matches:
        raise DmxError(
            f"{source}: wanted one layout, found what fits {' and '.join(matches)}; say which with --layout"
        )
    looked_for = "\n".join(f"  {layout.name}: {layout.wanted}" for layout in LAYOUTS.values())
    raise DmxError(
        f"{source}: no known layout recognised. Looked for\n{looked_for}\nFound: {_what_is_there(source)}.\n"
        "Name the layout with --layout if it is one of these, or point at the folder that holds it."
    )
