"""An EfficientNet-Lite as transformers knows a vision encoder; how a family reads it is in test_families.py."""

import pytest
import torch
from fakes import fake_efficientnet
from transformers import AutoConfig, AutoModel

from pixrec.model.vision_tower import EfficientNetLiteConfig, register


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    fake_efficientnet(monkeypatch)
    register()
    register()


def test_it_is_built_saved_and_loaded_by_the_auto_classes(tmp_path):
    torch.manual_seed(0)
    config = EfficientNetLiteConfig(name="small", image_size=32, hidden_size=8, tokens_per_side=2)
    tower = AutoModel.from_config(config).eval()
    tower.save_pretrained(tmp_path)
    found = AutoConfig.from_pretrained(tmp_path)
    assert (found.name, found.image_size, found.hidden_size, found.tokens_per_side) == ("small", 32, 8, 2)
    pixels = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        again = AutoModel.from_pretrained(tmp_path).eval()(pixels)
        assert torch.equal(again.last_hidden_state, tower(pixels).last_hidden_state)
    assert len(again.hidden_states) == 1


def test_a_token_is_the_mean_of_its_part_of_the_map_row_by_row():
    config = EfficientNetLiteConfig(name="small", image_size=32, hidden_size=8, tokens_per_side=2)
    tower = AutoModel.from_config(config).eval()
    pixels = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        features, tokens = tower.map(pixels), tower(pixels).last_hidden_state
    assert features.shape == (1, 8, 4, 4)
    assert tokens.shape == (1, 4, 8)
    for number, (row, column) in enumerate(((0, 0), (0, 2), (2, 0), (2, 2))):
        part = features[0, :, row : row + 2, column : column + 2].mean((1, 2))
        assert torch.allclose(tokens[0, number], part, atol=1e-6)
