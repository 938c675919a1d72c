from __future__ import annotations

import copy

import pytest

from pixrec.errors import ArtifactError, InputError, PixRecError, UnreadableImage, fault_text, raise_fault


class Elsewhere(InputError):
    """An error of ours that another module defines."""


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ArtifactError('out/model: no "model.json"\nthere'), ArtifactError),
        (PixRecError("Käse \udcff"), PixRecError),
        (InputError(), InputError),
        (UnreadableImage("not a picture"), UnreadableImage),
        (Elsewhere("loss is nan"), InputError),
    ],
)
def test_an_error_travels_as_text(error: PixRecError, kind: type[PixRecError]):
    with pytest.raises(PixRecError) as raised:
        raise_fault(fault_text(error))
    assert type(raised.value) is kind
    assert str(raised.value) == str(error)


def test_no_fault_raises_nothing():
    raise_fault(None)


def test_an_unreadable_picture_keeps_its_reason_wherever_it_goes():
    """As a copy, which is how Ray hands an error from process to process, and as text."""
    with pytest.raises(UnreadableImage) as raised:
        raise_fault(fault_text(copy.copy(UnreadableImage("too many pixels"))))
    assert raised.value.reason == "too many pixels"
    assert str(raised.value) == "unreadable picture: too many pixels"
