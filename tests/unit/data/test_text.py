from __future__ import annotations

import time

import pytest

from pixrec.data.text import MAX_DESCRIPTION_CHARACTERS, item_text, plain_text


def test_all_fields_in_reading_order():
    fields = {
        "description": "Toys come alive.",
        "price": 12.5,
        "category": "Animation|Children's|Comedy",
        "brand": "John Lasseter",
        "title": "Toy Story",
        "year": 1995,
    }
    assert item_text(fields) == (
        "Toy Story | by John Lasseter | Animation, Children's, Comedy | $12.50 | Toys come alive."
    )


def test_what_is_unknown_is_left_out():
    unknown = {"title": "A", "brand": None, "category": " | ", "price": float("nan"), "description": " "}
    assert item_text(unknown) == "A"
    assert item_text({}) == ""


def test_white_space_collapses_to_one_line():
    assert item_text({"title": " Red\n shoe\t", "brand": "A\u00a0 B"}) == "Red shoe | by A B"


def test_a_long_description_is_cut_at_a_word():
    text = item_text({"description": "word " * 1000})
    assert len(text) <= MAX_DESCRIPTION_CHARACTERS
    assert text.endswith("word")
    assert item_text({"description": "x" * 1000}) == "x" * MAX_DESCRIPTION_CHARACTERS


def test_a_free_item_has_a_price():
    assert item_text({"price": 0.0}) == "$0.00"


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("Plain  text\n", "Plain text"),
        ("<p>One</p><p>Two<br/>three</p>", "One Two three"),
        ("Salt &amp; pepper &#39;n&#39; oil", "Salt & pepper 'n' oil"),
        ("&lt;b&gt;Bold&lt;/b&gt; &amp;amp; twice", "Bold & twice"),
        ("5 < 6 and 7 > 3, <3", "5 < 6 and 7 > 3, <3"),
        ("<!-- note -->A<style>p {x: y}</style>B<SCRIPT src='a'>if (1) {}</script >C", "A B C"),
        ("<a href='x' title='cut", "<a href='x' title='cut"),
        ("nul\0 and \u00a0 space", "nul and space"),
        ("", ""),
    ],
)
def test_html_becomes_text(markup: str, text: str):
    assert plain_text(markup) == text


def test_hostile_html_takes_no_longer_than_its_length():
    started = time.monotonic()
    for markup in ("<" * 200_000, "<a " * 70_000, "<script>" * 25_000, "<!--" * 50_000, "&amp;" * 40_000):
        plain_text(markup)
    assert time.monotonic() - started < 5
