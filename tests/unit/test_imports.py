"""Imports point one way, and Lightning stays out of the models."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "flextok_pl"

# From the bottom up: a part may import those above it in this list, and no others.
LAYERS = (
    (
        "contracts",
        "precision",
        "progress",
        "files",
        "errors",
        "keys",
        "distributed",
        "downloads",
        "posix",
        "transfer",
        "parts",
        "records",
        "channels",
        "config",
        "assets",
    ),
    ("layers", "flow", "backbones"),
    ("interop", "metrics"),
    ("sharing",),
    ("models",),
    ("data",),
    ("evaluation", "cost", "diagnosis"),
    ("search",),
    ("runtime",),
    ("modules", "callbacks"),
    ("sweeps",),
    ("app",),
    ("cli",),
    ("__main__",),
)
LIGHTNING_PARTS = {"runtime", "modules", "callbacks", "cli"}
LIGHTNING_FILES = {"data/datamodule.py"}


def python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(file: Path) -> Iterator[tuple[str, bool]]:
    """(dotted module, whether at the top of the file) of each import."""
    tree = ast.parse(file.read_text())
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            if node.module == "flextok_pl":
                yield from ((f"flextok_pl.{alias.name}", id(node) in top) for alias in node.names)
            else:
                yield str(node.module), id(node) in top


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("file", python_files(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_one_way(file: Path) -> None:
    part, name = part_of(file), str(file.relative_to(PACKAGE))
    if name == "__init__.py":
        return
    level = next(i for i, parts in enumerate(LAYERS) if part in parts)
    allowed = {part, *(lower for parts in LAYERS[:level] for lower in parts)}
    for module, at_top in imports(file):
        root, *rest = module.split(".")
        if root != "flextok_pl" or not rest:
            continue
        assert rest[0] in allowed, f"{name} imports {module}; {part} may import {sorted(allowed)}"
        assert at_top or file.name == "__init__.py", f"{name} imports {module} inside a function"


def test_no_circle() -> None:
    def home(module: str) -> Path | None:
        place = PACKAGE.parent / module.replace(".", "/")
        found = [file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()]
        return found[0] if found else None

    graph = {
        file: {home(module) for module, at_top in imports(file) if at_top and module.startswith("flextok_pl.")}
        for file in python_files()
    }
    assert len(list(TopologicalSorter(graph).static_order())) >= len(graph)


def test_the_drawing_is_the_code() -> None:
    """docs/architecture.md draws the imports that do not follow from others; `base` stands for single files."""
    graph: dict[str, set[str]] = {}
    for file in python_files():
        part = part_of(file)
        if part.startswith("__"):
            continue
        parts = {module.split(".")[1] for module, _ in imports(file) if module.startswith("flextok_pl.")}
        name, *named = ("base" if part in LAYERS[0] else part for part in (part, *parts))
        graph.setdefault(name, set()).update({*named} - {name})

    def below(part: str) -> set[str]:
        return graph[part].union(*map(below, graph[part]))

    direct = {(part, low) for part in graph for low in graph[part] if not any(low in below(b) for b in graph[part])}
    drawing = (PACKAGE.parent / "docs" / "architecture.md").read_text().split("```mermaid")[1].split("```")[0]
    assert set(re.findall(r"(\w+) --> (\w+)", drawing)) == direct


@pytest.mark.parametrize("file", python_files(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_lightning_stays_above_the_models(file: Path) -> None:
    name = str(file.relative_to(PACKAGE))
    if part_of(file) in LIGHTNING_PARTS or name in LIGHTNING_FILES:
        return
    roots = {module.split(".")[0] for module, _ in imports(file)}
    assert not roots & {"lightning", "pytorch_lightning", "lightning_fabric"}


def test_the_walk_sees_imports_in_functions(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text("import a\ndef f():\n    from flextok_pl import cli\n    from flextok_pl.cli.tools import x\n")
    assert list(imports(file)) == [("a", True), ("flextok_pl.cli", False), ("flextok_pl.cli.tools", False)]


def test_no_global_randomness() -> None:
    for file in python_files():
        roots = [module for module, _ in imports(file)]
        assert "random" not in roots and "numpy.random" not in roots, file
        assert "np.random." not in file.read_text(), file


def test_shards_and_models_load_without_what_they_do_not_use() -> None:
    parts = "flextok_pl.data.shards.verify, flextok_pl.data.encode.latents, flextok_pl.models.tokenizer"
    script = f"import sys, {parts}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert "flextok_pl.data.shards.verify" in loaded
    assert not {"lightning", "torchmetrics", "transformers", "diffusers.models.autoencoders"} & set(loaded)


# What may unpickle, or run what a file says -> what makes it safe; None for nothing.
UNPICKLING = {
    "torch.load": ("weights_only", True),
    "load_state_dict_from_url": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
    **dict.fromkeys(("pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load", "torch.jit.load"), None),
    **dict.fromkeys(("torch.hub.load", "yaml.load", "yaml.unsafe_load", "shelve.open", "marshal.loads"), None),
    **dict.fromkeys(("eval", "exec"), None),
}


@pytest.mark.parametrize("file", python_files(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_file_that_is_read_can_run_code(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {word.arg: word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)}
        assert not given.get("trust_remote_code"), f"{file}:{node.lineno}"
        for unsafe, remedy in UNPICKLING.items():
            if name == unsafe or ("_" in unsafe and name.endswith(f".{unsafe}")):
                assert remedy is not None and given.get(remedy[0]) is remedy[1], f"{file}:{node.lineno}: {name}"
