"""Every notebook runs from top to bottom, and so does the Python code of the README."""

import re
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def test_they_run(tmp_path: Path) -> None:
    """One after the other in one kernel, as torch takes long to import; each begins without the names of the others."""
    assert len(NOTEBOOKS) == 4
    place = tmp_path / "notebooks"  # beside which the first of them makes the data of all
    place.mkdir()
    contents = [nbformat.read(notebook, as_version=4) for notebook in NOTEBOOKS]
    whole = nbformat.v4.new_notebook(metadata=contents[0].metadata)
    for content in contents:
        whole.cells += [nbformat.v4.new_code_cell("%reset -f"), *content.cells]
    NotebookClient(whole, timeout=600, resources={"metadata": {"path": str(place)}}).execute()
    for notebook, content in zip(NOTEBOOKS, contents, strict=True):
        pictures = [o for cell in content.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
        assert len(pictures) >= 3, notebook.stem


def test_the_code_of_the_readme_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec("\n".join(blocks), names)
    assert len(blocks) == 2 and names["images"].shape == (2, 3, 64, 64)
