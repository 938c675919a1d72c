"""Pictures that a request names by a URI."""

from __future__ import annotations

from pathlib import Path

import pytest

from pixrec.config import ServeConfig
from pixrec.errors import InputError
from pixrec.serving import pictures
from pixrec.serving.pictures import read_pictures


def test_each_item_gets_the_bytes_of_its_own_uri(tmp_path: Path) -> None:
    uris = {}
    for number in range(20):  # more than are read at a time
        (tmp_path / f"{number}").write_bytes(bytes([number]))
        uris[f"i{number}"] = str(tmp_path / f"{number}")
    found = read_pictures(uris, ServeConfig(image_uris=(f"{tmp_path}/",)))
    assert found == {f"i{number}": bytes([number]) for number in range(20)}


@pytest.mark.parametrize(
    "uri",
    ["{folder}/a", "{folder}/pictures/../a", "s3://other/a", "file:///etc/passwd", "http:/x", "pictures/a", "a", "/"],
)
def test_what_the_settings_do_not_name_is_not_read(tmp_path: Path, uri: str) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "a").write_bytes(b"secret")
    config = ServeConfig(image_uris=(f"{tmp_path}/pictures/", "s3://mine/", "http://"))
    with pytest.raises(InputError, match=r"item 'n': serve.image_uris does not allow"):
        read_pictures({"n": uri.format(folder=tmp_path)}, config)


def test_an_address_of_the_own_network_is_refused() -> None:
    with pytest.raises(InputError, match="item 'n': its image_uri gave no picture: address refused"):
        read_pictures({"n": "http://127.0.0.1:1/a.jpg"}, ServeConfig())


def test_limits_hold_for_each_picture_and_for_all_together(tmp_path: Path) -> None:
    uris = {}
    for name in "ab":
        (tmp_path / name).write_bytes(b"x" * 60)
        uris[name] = str(tmp_path / name)
    one = ServeConfig(image_uris=(f"{tmp_path}/",), max_image_bytes=50)
    with pytest.raises(InputError, match="file too large"):
        read_pictures(uris, one)
    together = ServeConfig(image_uris=(f"{tmp_path}/",), max_body_bytes=100)
    with pytest.raises(InputError, match="more than 100 bytes"):
        read_pictures(uris, together)


def test_reading_ends_with_the_time_of_the_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"x")
    clock = iter([0.0, 31.0])
    monkeypatch.setattr(pictures.time, "monotonic", lambda: next(clock, 31.0))
    with pytest.raises(InputError, match="within 30 s"):
        read_pictures({"a": str(tmp_path / "a")}, ServeConfig(image_uris=(f"{tmp_path}/",)))
