"""What a process pays to start: Ray starts dozens, most of which read, decode or pass on and never see a model."""

from __future__ import annotations

import subprocess
import sys

import pytest

MODEL_CODE = ("transformers.modeling_utils", "transformers.activations", "torch._dynamo", "accelerate", "peft")
"""Loaded where a model is built, and not before: four seconds of a CPU."""

ROOMS = {
    # CPU tasks of prepare and embed, the ingress of a server, the command until it knows its verb
    "reads and decodes": (
        ("artifact.decoding", "artifact.versions", "cluster.prepare", "data.tokens", "live.places", "cli"),
        ("torch", "transformers", "ray.data", "faiss"),
    ),
    "answers HTTP": (("serving.deployments", "serving.published"), ("torch", "transformers", "lance")),
    "searches": (("serving.shards", "artifact.approximate"), ("transformers", "ray")),
    "ranks": (("recommender", "evaluation"), ("ray", *MODEL_CODE, "torch.distributed.fsdp")),
    # drivers, and workers of theirs until they load a model
    "drives": (
        ("verbs", "cluster.embed", "cluster.evaluate", "cluster.feed", "cluster.vision"),
        (*MODEL_CODE, "torch.distributed.fsdp"),
    ),
}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_does_not_load_what_it_does_not_use(room: str):
    modules, kept_out = ROOMS[room]
    script = f"import sys, {', '.join(f'pixrec.{name}' for name in modules)}; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert set(ran.stdout.split()).isdisjoint(kept_out)
