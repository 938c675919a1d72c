"""A process that trains or recommends without Ray never imports it, nor the web framework."""

import sys
from pathlib import Path

from processes import LIBRARY, run_ranks


def note_modules(folder: str) -> None:
    """The work of a rank."""
    Path(folder, "modules").write_text(" ".join(sys.modules))


def test_model_and_training_run_without_ray(tmp_path: Path):
    run_ranks(str(tmp_path), (1, note_modules))
    seen = set((tmp_path / "modules").read_text().split())
    assert seen >= set(LIBRARY)
    assert not {name.partition(".")[0] for name in seen} & {"ray", "fastapi"}
