"""Rates and decay of each part of the towers."""

import pytest
import torch
from fakes import tiny_config, tiny_model

from pixrec.training.groups import PRETRAINED, groups, kind_of, rate_of
from pixrec.training.interleaved import choose_trainable


def grouped(model, config):
    """Of every trained parameter by name its rate and whether it decays."""
    choose_trainable(model.tower, config)
    named = {n: p for n, p in model.tower.named_parameters() if p.requires_grad}
    found = {}
    for group in groups(model.tower, named, config):
        names = [n for n, p in named.items() if any(p is other for other in group["params"])]
        assert not set(names) & set(found), "in two groups"
        found |= {n: (group["lr"], group.get("weight_decay", 1) > 0) for n in names}
    assert set(found) == set(named)
    return found


def test_the_default_backbone_learns_as_fast_as_its_heads():
    model = tiny_model()
    found = grouped(model, model.config)
    assert {rate for rate, _ in found.values()} == {model.config.train.learning_rate}
    shapes = dict(model.tower.named_parameters())
    assert all(decays == (shapes[name].ndim >= 2) for name, (_, decays) in found.items())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("item_proj.weight", "heads"),
        ("log_temperature", "heads"),
        ("backbone.model.model.text_model.layers.0.mlp.up_proj.weight", "backbone"),
        ("backbone.model.model.text_model.layers.0.self_attn.q_proj.lora_A.default.weight", "adapters"),
        ("backbone.model.model.vision_model.encoder.layers.0.self_attn.q_proj.lora_A.default.weight", "adapters"),
        ("backbone.model.model.vision_model.encoder.layers.0.mlp.fc1.weight", "vision"),
        ("backbone.model.model.connector.modality_projection.proj.weight", "connector"),
        ("backbone.model.model.visual.blocks.0.mlp.gate_proj.weight", "vision"),
        ("backbone.model.model.visual.merger.mlp.0.weight", "connector"),
        ("backbone.model.model.visual.deepstack_merger_list.0.norm.weight", "connector"),
        ("backbone.model.model.multi_modal_projector.linear.weight", "connector"),
    ],
)
def test_every_parameter_has_its_kind(name, kind):
    parts = ("vision_model", "connector", "visual", "vision_tower", "multi_modal_projector")
    assert kind_of(name, parts) == kind


def test_a_pretrained_backbone_has_the_rates_of_the_field_or_those_set():
    config = tiny_config(model={"backbone": "team/model"}, train={"learning_rate": 3e-3, "rates": {"vision": 5e-6}})
    assert rate_of("heads", config) == 3e-3
    assert rate_of("vision", config) == 5e-6
    for kind in ("backbone", "adapters", "connector"):
        assert rate_of(kind, config) == PRETRAINED[kind]


def test_embeddings_norms_and_biases_of_a_pretrained_backbone_do_not_decay():
    model = tiny_model()
    config = tiny_config(model={"backbone": "team/model"})
    found = grouped(model, config)
    undecayed = {name for name, (_, decays) in found.items() if not decays}
    assert any("embed_tokens" in name for name in undecayed)
    assert not any("proj.weight" in name for name in undecayed)
    shapes = dict(model.tower.named_parameters())
    assert all(shapes[name].ndim < 2 or "embed_tokens" in name for name in undecayed)
    assert next(iter(groups(model.tower, shapes, config)))["lr"] == config.train.learning_rate
    assert torch.is_tensor(shapes["log_temperature"])
