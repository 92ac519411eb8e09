"""Nothing that DMX reads is run: what could run it is not called, or only in its harmless way."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = [path for folder in ("dmx", "cluster", "kernels", "launch") for path in (ROOT / folder).rglob("*.py")]
# Collectives of torch that pickle, under whatever name its module is imported.
PICKLING = {
    *("broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list"),
    *("send_object_list", "recv_object_list"),
}
# Calls that make objects, or run code, of what they read; those with a keyword are harmless with it.
FORBIDDEN = {
    **dict.fromkeys(("pickle.load", "pickle.loads", "pickle.Unpickler", "shelve.open", "marshal.load")),
    **dict.fromkeys(("marshal.loads", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec")),
    **dict.fromkeys(("joblib.load", "cloudpickle.loads", "os.system", *PICKLING)),
    "torch.load": "weights_only",
}
# What is admitted all the same, by file and call, and why.
ADMITTED = {
    # Streams of Ray Data, which pickle alone carries. No file: where a run spans hosts its first
    # process gives them to the others by the store of Ray's head, which asks for the cluster's token.
    ("dmx/extraction/feed.py", "cloudpickle.loads"),
}


def _calls(path: Path) -> list[tuple[str, ast.Call]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [(_name(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def _name(function: ast.expr) -> str:
    """As it is written, but without the module where it is one that pickles."""
    name = ast.unparse(function)
    last = name.rpartition(".")[2]
    return last if last in PICKLING else name


def _is_harmless(name: str, call: ast.Call) -> bool:
    keyword = FORBIDDEN[name]
    return any(
        word.arg == keyword and isinstance(word.value, ast.Constant) and word.value.value is True
        for word in call.keywords
    )


def test_nothing_that_is_read_is_run() -> None:
    found = {
        (str(path.relative_to(ROOT)), name)
        for path in CODE
        for name, call in _calls(path)
        if name in FORBIDDEN and not _is_harmless(name, call)
    }
    assert found == ADMITTED


def test_nothing_is_pickled_over_the_process_group() -> None:
    """Not even by another name: Gloo's ports take what anybody sends."""
    found = {
        (str(path.relative_to(ROOT)), name)
        for path in CODE
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in (getattr(node, "id", None), getattr(node, "attr", None), getattr(node, "name", None))
        if name in PICKLING
    }
    assert not found


def test_arrays_are_read_without_pickles() -> None:
    """NumPy's own default, which nobody changes here."""
    words = [word.arg for path in CODE for _, call in _calls(path) for word in call.keywords]
    assert "allow_pickle" not in words


def test_only_the_list_of_keys_is_unpickled() -> None:
    """By an unpickler that admits no more than containers, text and numbers (tests/unit/test_layouts.py)."""
    users = {
        str(path.relative_to(ROOT))
        for path in CODE
        if "pickle._Unpickler" in path.read_text(encoding="utf-8")
    }
    assert users == {"dmx/data/layouts/luperson.py"}
