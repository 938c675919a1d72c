"""The quickstart notebook runs from tables to recommendations, and its committed outputs are those of such a run.

`make notebook` (UPDATE_NOTEBOOK=1 in the environment) runs it and keeps the outputs, but for what went to stderr.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
import ray
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "docs" / "quickstart.ipynb"
MOST_BYTES = 300_000
PICTURE = "data:image/jpeg;base64,"


def executed(folder: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a run in `folder`. Raises where a cell does."""
    notebook = nbformat.read(NOTEBOOK, 4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=600, resources=resources, record_timing=False).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def outputs(notebook: nbformat.NotebookNode) -> Iterator[tuple[int, str, Any]]:
    """Cell, MIME type (or the name of a stream), content."""
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                yield number, output.name, output.text
            for kind, content in output.get("data", {}).items():
                yield number, kind, content


def shape(notebook: nbformat.NotebookNode) -> set[tuple[int, str, bool]]:
    """Which cell has output of which kind, and whether pictures are in it."""
    return {(number, kind, PICTURE in str(content)) for number, kind, content in outputs(notebook)}


def test_it_runs(ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)  # one instance, not one for each verb
    made = executed(tmp_path)
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"data", "model", "index", "report"}
    if os.environ.get("UPDATE_NOTEBOOK"):
        nbformat.write(made, NOTEBOOK)
    kept = nbformat.read(NOTEBOOK, 4)
    assert shape(made) == shape(kept), "run `make notebook` and commit what it wrote"
    assert NOTEBOOK.stat().st_size <= MOST_BYTES
    texts = " ".join(str(content) for _, _, content in outputs(kept))
    assert texts.count(PICTURE) > 30
    assert not re.search(r"(?<![\w.:/])/(tmp|home|root|work)/", texts), "it names places of the machine it ran on"
