"""Training processes: waiting for GPUs, and checkpoints of a training in the process of the driver."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pixrec.cluster.workers import Checkpoints, Cluster, await_gpus
from pixrec.config import TrainConfig
from pixrec.errors import InputError

GPUS = TrainConfig(use_gpu=True, num_workers=2, gpu_wait_seconds=60)


class Growing:
    """A cluster whose GPUs come and go with the clock, which moves when somebody sleeps."""

    def __init__(self, gpus: Iterator[int]) -> None:
        self.gpus, self.said, self.asked, self.moment = gpus, [], [], 0.0
        self.cluster = Cluster(
            lambda: {"CPU": 8.0, "GPU": float(next(self.gpus))},
            lambda: 1,
            self.asked.append,
            lambda line: self.said.append((self.moment, line)),
            self.sleep,
            lambda: self.moment,
        )

    def sleep(self, seconds: float) -> None:
        self.moment += seconds


def test_enough_gpus_are_not_waited_for():
    growing = Growing(iter([2]))
    await_gpus(GPUS, growing.cluster)
    assert (growing.said, growing.asked, growing.moment) == ([], [], 0)
    await_gpus(TrainConfig(num_workers=2), Growing(iter([0])).cluster)


def test_too_few_gpus_are_said_at_once_and_asked_of_an_autoscaler():
    growing = Growing(iter([0, 1, 2]))
    await_gpus(GPUS, growing.cluster)
    [(moment, line)] = growing.said
    assert moment < 30
    assert "\n" not in line
    for part in ("needs 2 GPUs", "the cluster has 0 (1 nodes, 8 CPUs)", "60 s (train.gpu_wait_seconds)", "autoscaler"):
        assert part in line
    assert growing.asked == [[{"CPU": 0.5, "GPU": 1.0}] * 2, []], "asked for, and no longer once they are there"
    assert 0 < growing.moment < 60


@pytest.mark.parametrize("seconds", [60, 0])
def test_gpus_that_do_not_come_end_the_run_with_the_cure(seconds: float):
    growing = Growing(iter([1] * 99))
    with pytest.raises(InputError, match=r"needs 2 GPUs.*has 1 .*add GPU nodes, lower train\.num_workers"):
        await_gpus(TrainConfig(use_gpu=True, num_workers=2, gpu_wait_seconds=seconds), growing.cluster)
    assert growing.moment == seconds
    assert growing.asked[-1] == []


def test_on_ray_too_few_gpus_end_with_one_line(ray_session: None, capfd: pytest.CaptureFixture[str]):
    with pytest.raises(InputError, match="needs 3 GPUs"):
        await_gpus(TrainConfig(use_gpu=True, num_workers=3, gpu_wait_seconds=0))
    assert "train.use_gpu needs 3 GPUs, and the cluster has" in capfd.readouterr().err


def test_without_workers_the_latest_and_the_best_checkpoint_are_kept_by_the_driver(tmp_path: Path):
    """Ray Train's local mode forgets them."""
    work = str(tmp_path / "work")
    checkpoints = Checkpoints(work, 0)
    with checkpoints.latest() as folder:
        assert folder is None
    kept = []
    for step, score in enumerate((0.2, 0.5, 0.3, 0.4)):
        made = tmp_path / f"made-{step}"
        made.mkdir()
        (made / "model.json").write_text(str(step))
        checkpoints.add(str(made), score, step)
        assert not made.exists()
        kept.append(sorted(path.name for path in (tmp_path / "work" / "here").iterdir() if path.is_dir()))
    assert kept == [["step-0"], ["step-1"], ["step-1", "step-2"], ["step-1", "step-3"]]
    with Checkpoints(work, 0).latest() as folder:
        assert (Path(folder) / "model.json").read_text() == "3"
