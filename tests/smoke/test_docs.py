"""The documentation becomes a site without a warning, and its Python is whole and imports names that exist."""

import ast
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

from flextok_pl import __all__ as public
from flextok_pl.cli.commands import COMMANDS

ROOT = Path(__file__).parents[2]


class Anchors(HTMLParser):
    """The ids of a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids |= {value for name, value in attrs if name == "id" and value}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder))
    config.plugins.on_startup(command="build", dirty=False)
    build(config)  # strict: a warning is an error
    return folder


def test_the_reference_has_every_command_and_every_public_name(site: Path) -> None:
    commands = Anchors(site / "commands" / "index.html").ids
    assert [name for name in COMMANDS if f"flextok-{name.replace(' ', '-')}" not in commands] == []
    names = {each.rpartition(".")[2] for each in Anchors(site / "api" / "index.html").ids}
    assert [name for name in public if not name.startswith("DEMO_") and name not in names] == []


def test_every_footnote_has_its_text(site: Path) -> None:
    pages = [page for page in site.rglob("index.html") if "source" not in page.relative_to(site).parts]
    assert len(pages) > 20
    assert [page.parent.name for page in pages if "[^" in page.read_text()] == []


def test_links_to_code_show_it(site: Path) -> None:
    shown = (site / "source" / "flextok_pl" / "layers" / "packing.py" / "index.html").read_text()
    assert "packing" in shown and "highlight" in shown


BLOCKS = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in [
        *sorted((ROOT / "docs").glob("*.md")),
        ROOT / "data" / "README.md",
        ROOT / "flextok_pl/assets/README.md",
    ]
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_python_blocks_import_names_that_exist(block: str) -> None:
    """Of the README, `test_notebooks.py` runs them."""
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            exec(compile(ast.Module([node], []), "<docs>", "exec"), {})
