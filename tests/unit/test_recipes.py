"""Every recipe loads, and the table of recipes/README.md has a row for each of them and for nothing else."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from pixrec.cli import _parser
from pixrec.config import Config, load_config

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
TABLE = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in (ROOT / "recipes" / "README.md").read_text().splitlines()
    if line.startswith("| [`")
]
CONFIG, _, DATA, MACHINE, MINUTES, MEMORY, RESULT, COMMAND = range(8)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_loads_and_changes_something(recipe: Path) -> None:
    assert load_config(recipe.read_text()) != Config()
    assert recipe.read_text().startswith("# "), "its first line says what it is for"


def test_the_table_has_a_row_for_each_recipe() -> None:
    named = [re.fullmatch(r"\[`(.+)`\]\((.+)\)", row[CONFIG]) for row in TABLE]
    assert [found and found[1] for found in named] == [found and found[2] for found in named]
    assert sorted(found[1] for found in named if found) == [recipe.name for recipe in RECIPES]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[CONFIG])
def test_a_row_is_whole_and_its_command_runs_its_file(row: list[str]) -> None:
    assert len(row) == 8
    assert all(row)
    program, *words = shlex.split(row[COMMAND].strip("`"))
    arguments = _parser().parse_args(words)
    assert program == "pixrec"
    assert f"({Path(arguments.config).name})" in row[CONFIG]
    load_config((ROOT / arguments.config).read_text(), arguments.set)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[CONFIG])
def test_a_figure_has_its_interval_or_says_that_there_is_none(row: list[str]) -> None:
    interval = re.search(r"\.\d+ \[\.\d+, \.\d+\]", row[RESULT])
    assert interval or "not recorded" in row[RESULT] or row[RESULT] == "not measured"
    assert re.match(r"not measured|computed: |\d", row[MEMORY])
    assert re.match(r"not measured|\d", row[MINUTES])


@pytest.mark.parametrize("recipe", [path for path in RECIPES if path.stem.startswith("vlm_")], ids=lambda r: r.stem)
def test_a_recipe_for_a_real_backbone_pins_it_and_keeps_enough_of_its_pictures(recipe: Path) -> None:
    config = load_config(recipe.read_text())
    assert config.model.backbone != "pixrec-tiny"
    if config.model.backbone.startswith("package:"):  # pinned by the hash of its file, and small enough for a CPU
        assert config.model.dtype == config.train.precision == "bf16"
        return
    assert config.train.use_gpu
    assert config.train.precision == "bf16"
    if recipe.stem == "vlm_qlora":
        return
    assert config.model.revision, "a branch, tag or commit"
    assert config.model.dtype == ("bf16" if config.model.lora.enabled else "float32")
    if "Qwen" in config.model.backbone:
        assert config.prepare.image_size_px**2 >= config.model.max_pixels
    (row,) = [row for row in TABLE if f"({recipe.name})" in row[CONFIG]]
    assert re.match(r"computed: [\d.]+ GiB of 80|not measured: ", row[MEMORY])
    assert f"{config.train.num_workers} GPU" in row[MACHINE].replace("one", "1")
