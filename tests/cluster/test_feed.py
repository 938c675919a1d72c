"""Training fed by Ray Data reads what it reads in one process, to the bit."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import ray
import ray.data
import safetensors.torch
import torch
from fakes import tiny_config, tiny_dataset, tiny_items, tiny_model, write_prepared

from pixrec.cluster.feed import READING, feed_by_ray_data, uses_ray_data, while_prompt
from pixrec.config import Config, TrainConfig
from pixrec.data.joined import join_datasets
from pixrec.data.sequences import Dataset
from pixrec.model.catalog import Catalog
from pixrec.training.interleaved import InterleavedTrainer
from pixrec.training.phases import interleaved_trainer
from pixrec.training.reading import Reader

STEPS = 6


def config_of(**train: Any) -> Config:
    options = {"max_steps": STEPS, "epochs": 10, "histories_per_step": 4, "modality_dropout": 0.3}
    return tiny_config(model={"user_tower": "interleaved"}, train={**options, "readers_per_worker": 2, **train})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    items = tiny_items(with_pictures=range(8))
    return write_prepared(tmp_path_factory.mktemp("feed") / "data", tiny_dataset(items, num_events=7))


def trainer_of(dataset: Dataset, config: Config) -> InterleavedTrainer:
    model = tiny_model(config, dataset.items)
    return interleaved_trainer(model, Catalog(dataset.items, model.encoder), join_datasets([dataset]), config)


def test_losses_are_those_of_one_process_also_from_a_step_on(ray_session: None, dataset: Dataset):
    config = config_of()
    alone, fed = trainer_of(dataset, config), trainer_of(dataset, config)
    feed_by_ray_data(fed, [dataset.uri], config)
    losses = [alone.train_step()["loss"] for _ in range(STEPS)]
    assert [fed.train_step()["loss"] for _ in range(STEPS)] == losses
    with pytest.raises(StopIteration):
        next(fed._reads)
    assert [read.step for read in fed.feed(STEPS - 2)] == [STEPS - 2, STEPS - 1]


class Busy:
    """Takes CPUs and does nothing."""

    def ready(self) -> None: ...


def test_a_worker_without_readers_reads_for_itself(
    ray_session: None, dataset: Dataset, capsys: pytest.CaptureFixture[str]
):
    config = config_of(cpus_per_reader=1.0, reader_wait_seconds=0.2)
    alone, fed = trainer_of(dataset, config), trainer_of(dataset, config)
    feed_by_ray_data(fed, [dataset.uri], config)
    busy: Any = ray.remote(num_cpus=ray.cluster_resources()["CPU"])(Busy).remote()
    ray.get(busy.ready.remote())
    try:
        assert [fed.train_step()["loss"] for _ in range(STEPS)] == [alone.train_step()["loss"] for _ in range(STEPS)]
    finally:
        ray.kill(busy)
    assert "worker 0 reads the steps 0 to 6 for itself" in capsys.readouterr().err
    for thread in threading.enumerate():
        if thread.name == READING:
            thread.join(60)  # ends with the next Read, now that there is a CPU
            assert not thread.is_alive()


def test_values_come_in_order_until_one_is_late():
    late = threading.Event()

    def values() -> Iterator[int]:
        yield from (1, 2)
        late.wait(60)
        yield 3

    assert list(while_prompt(values(), 1)) == [1, 2]
    late.set()
    assert list(while_prompt(values(), 60)) == [1, 2, 3]
    with pytest.raises(ZeroDivisionError):
        list(while_prompt((1 // n for n in (1, 0)), 60))


@pytest.mark.parametrize("option", [{"gradient_accumulation": 2}, {"micro_batch_histories": 1}])
def test_each_of_two_workers_gets_its_reads_in_order(ray_session: None, dataset: Dataset, option: dict[str, Any]):
    config = config_of(num_workers=2, **option)
    for rank in range(2):
        trainer = trainer_of(dataset, config)
        expected = Reader(trainer.source, trainer.collate).feed(rank, 2)(0)
        trainer.rank, trainer.world_size = rank, 2
        feed_by_ray_data(trainer, [dataset.uri], config)
        for read, local in zip(trainer.feed(0), expected, strict=True):
            assert read.step == local.step
            found, wanted = (safetensors.torch.load(one._replace(seconds=0.0).to_bytes()) for one in (read, local))
            assert set(found) == set(wanted)
            assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())


def test_a_machine_alone_without_a_gpu_reads_for_itself(ray_session: None):
    assert not uses_ray_data(TrainConfig())
    assert uses_ray_data(TrainConfig(use_gpu=True))
    assert uses_ray_data(TrainConfig(feed="ray_data"))
    assert (ray.data.DataContext.get_current().target_max_block_size or 0) > 1, "a pipeline's settings are its own"
