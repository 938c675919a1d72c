"""The benchmark for GPUs, on a machine without one: the same code, and no figure of a GPU."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText

from benchmarks.gpu import SHAPES, main
from benchmarks.shapes import PUBLISHED, shape, small_tokenizer

BILLIONS = {"smolvlm-256m": 0.256, "qwen3-vl-2b": 2.13, "internvl3-1b": 0.94}


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it measures the real sizes, for minutes")
def test_without_a_gpu_it_says_so_and_runs_tiny_shapes(capsys):
    assert main(["--shapes", "smolvlm-256m", "--modes", "lora"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out.splitlines()[-1])
    assert found["gpu"] is False
    assert "no GPU" in found["machine"]
    assert "no GPU" in said.err
    (result,) = found["results"]
    for part in ("training", "embedding", "plain"):
        assert "mfu" not in result[part]
        assert "peak_memory_bytes" not in result[part]
        assert result[part]["step_seconds"] > 0
        assert result[part]["step_flop"] > 0
    assert 0 < result["parameters"]["trained"] < result["parameters"]["total"] < 1_000_000
    assert said.out.startswith("shape")


def test_time_that_is_up_begins_nothing(capsys):
    assert main(["--seconds", "-1"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {result["failed"] for result in found["results"]} == {"no time left"}
    assert {result["shape"] for result in found["results"]} == set(SHAPES) <= set(PUBLISHED)


@pytest.mark.parametrize("name", BILLIONS)
def test_shapes_have_the_size_of_the_published_models(name):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(shape(name, small_tokenizer(["word"]).get_vocab()))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(BILLIONS[name], rel=0.05)
