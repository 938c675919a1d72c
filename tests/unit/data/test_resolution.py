"""Pictures that a backbone takes larger than they are stored are found, and said with their cure."""

import pytest
from fakes import tiny_dataset, tiny_items, write_prepared

from pixrec import storage
from pixrec.data.images import PixelBudget
from pixrec.data.resolution import resolution


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eight pictures of 32 × 32 px, stored at up to 256."""
    folder = str(tmp_path_factory.mktemp("sized") / "data")
    write_prepared(folder, tiny_dataset(tiny_items(with_pictures=range(8))))
    return folder


@pytest.mark.parametrize(
    ("size", "small"),
    [(32, 0), (33, 8), (PixelBudget(8, 1024, 10**6), 0), (PixelBudget(8, 1025, 10**6), 8)],
    ids=["square", "larger square", "budget", "larger budget"],
)
def test_pictures_of_fewer_pixels_than_the_backbone_takes_are_counted(data, size, small):
    found = resolution(data, "team/backbone", size)
    assert (found.looked_at, found.small) == (8, small)


def test_the_line_names_the_cure(data, tmp_path):
    assert "find larger ones" in str(resolution(data, "team/backbone", 64)), "they were stored as they came"
    small = tmp_path / "data"
    written = write_prepared(small, tiny_dataset(tiny_items(with_pictures=range(8))))
    written.info["config"]["image_size_px"] = 32
    storage.write_json(str(small / "dataset.json"), {**written.info, "item_parts": [12]})
    said = str(resolution(str(small), "team/backbone", 64))
    assert "team/backbone takes pictures of 64 by 64 px, but 8 of 8 stored pictures" in said
    assert "prepare.image_size_px=64, or set model.small_pictures" in said
    assert "\n" not in said


def test_a_data_set_without_pictures_has_none_that_is_small(tmp_path):
    write_prepared(tmp_path / "data", tiny_dataset(tiny_items(with_pictures=False)))
    assert resolution(str(tmp_path / "data"), "team/backbone", 64).looked_at == 0


def test_no_more_than_a_sample_is_looked_at(data, monkeypatch):
    monkeypatch.setattr("pixrec.data.resolution.LOOKED_AT", 3)
    assert resolution(data, "team/backbone", 64).looked_at == 3
