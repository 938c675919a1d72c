"""tests/unit mirrors pixrec/: pixrec/data/text.py is tested by tests/unit/data/test_text.py. What needs Ray is tested
beside the others that do: pixrec/cluster/embed.py by tests/cluster/test_embed.py.

A module that has no such file stands in TESTED_ELSEWHERE with the file that tests it. Modules of a few statements (a
list of names, a table of columns) need neither.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
FEW_STATEMENTS = 10
"""Modules with no more statements inside their functions than this need no test of their own."""

TESTED_ELSEWHERE = {
    # one tree: fields, checks and loading are tested together
    **dict.fromkeys(
        (f"pixrec/config/{name}.py" for name in ("checks", "evaluate", "model", "prepare", "serve", "train", "tree")),
        "tests/unit/test_config.py",
    ),
    # a model and an index, saved and loaded as units
    "pixrec/artifact/index.py": "tests/unit/test_artifact.py",
    "pixrec/artifact/model.py": "tests/unit/test_artifact.py",
    # decoded, then embedded
    "pixrec/artifact/decoding.py": "tests/unit/artifact/test_embedding.py",
    # one door: files, tables and published folders, locally, and on s3:// in test_storage_s3.py
    **dict.fromkeys(
        (f"pixrec/storage/{name}.py" for name in ("files", "folders", "node", "places", "tables")),
        "tests/unit/test_storage.py",
    ),
    # the files of a prepared data set, by those who read them
    "pixrec/data/arrays.py": "tests/unit/data/test_sequences.py",
    "pixrec/data/rows.py": "tests/unit/data/test_pictures.py",
    "pixrec/data/filters.py": "tests/unit/data/test_items.py",
    # stores, by what makes and reads tokens
    "pixrec/data/tokens.py": "tests/unit/model/test_vision.py",
    # every step of it is a step of prepare
    "pixrec/data/partitions.py": "tests/cluster/test_prepare_partitions.py",
    # every family is held to the library's own forward pass by the same tests
    **dict.fromkeys(
        (f"pixrec/model/families/{name}.py" for name in ("base", "llava", "paligemma", "qwen", "smolvlm")),
        "tests/unit/model/test_families.py",
    ),
    "pixrec/retrieval/ranking.py": "tests/unit/test_recommender.py",
    "pixrec/model/catalog.py": "tests/unit/model/test_towers.py",
    "pixrec/scorers/sasrec.py": "tests/unit/training/test_compact.py",
    "pixrec/serving/backend.py": "tests/unit/serving/test_http.py",
    "pixrec/serving/edge.py": "tests/unit/serving/test_http.py",
    "pixrec/serving/items.py": "tests/unit/serving/test_http.py",
    "pixrec/serving/live.py": "tests/unit/serving/test_http.py",
    "pixrec/live/contents.py": "tests/unit/live/test_overlay.py",
    "pixrec/live/store.py": "tests/unit/live/test_sqlite.py",
    "pixrec/live/places.py": "tests/unit/live/test_sqlite.py",
    "pixrec/serving/replicas.py": "tests/unit/serving/test_deployments.py",
    "pixrec/training/validation.py": "tests/unit/training/test_interleaved.py",
    # used by every test that needs Ray
    "pixrec/cluster/session.py": "tests/cluster/conftest.py",
    "pixrec/cluster/probe.py": "tests/cluster/test_doctor.py",
    "pixrec/cluster/vision.py": "tests/cluster/test_picture_tokens.py",
}
"""Module -> the file that tests it, where that is not its own."""


def own_statements(module: Path) -> int:
    """Statements inside functions, docstrings left out: what can go wrong when it runs."""
    functions = (
        n for n in ast.walk(ast.parse(module.read_text())) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))
    )
    inside = {
        statement for function in functions for statement in ast.walk(function) if isinstance(statement, ast.stmt)
    }
    return sum(not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)) for s in inside)


def own_test(module: str) -> Path:
    """Where the test of `pixrec/a/b.py` belongs."""
    path = Path(module).relative_to("pixrec")
    kind = Path() if path.parts[0] == "cluster" else Path("unit")
    return ROOT / "tests" / kind / path.with_name(f"test_{path.name}")


MODULES = {
    file.relative_to(ROOT).as_posix(): own_statements(file)
    for file in sorted((ROOT / "pixrec").rglob("*.py"))
    if file.name != "__init__.py"
}


def test_every_module_has_a_test_of_its_own_or_says_where_it_is_tested() -> None:
    lacking = [
        f"{module} ({statements} statements): write {own_test(module).relative_to(ROOT)}, or say where it is tested"
        for module, statements in MODULES.items()
        if statements > FEW_STATEMENTS and not own_test(module).exists() and module not in TESTED_ELSEWHERE
    ]
    assert not lacking, "\n" + "\n".join(lacking)


def test_what_is_said_to_be_tested_elsewhere_is() -> None:
    wrong = [
        *(f"{module}: is not there; take it off the list" for module in TESTED_ELSEWHERE if module not in MODULES),
        *(
            f"{module}: has a test of its own; take it off the list"
            for module in TESTED_ELSEWHERE
            if own_test(module).exists()
        ),
        *(f"{module}: {test} is not there" for module, test in TESTED_ELSEWHERE.items() if not (ROOT / test).exists()),
    ]
    assert not wrong, "\n" + "\n".join(wrong)
