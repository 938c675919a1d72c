"""What every training shares: its schedule, when it ends, and what it does with a loss that is no number."""

import numpy as np
import pytest
import torch

from pixrec.config import CompactConfig, SequenceConfig
from pixrec.model.compact import CompactTower
from pixrec.training.compact import CompactTrainer
from pixrec.training.trainer import DivergedError, EarlyStopping, scheduled


def test_training_ends_when_nothing_gets_better():
    watch = EarlyStopping(2)
    assert [watch.is_best(score) for score in (0.1, 0.3, 0.2)] == [True, True, False]
    assert not watch.over
    assert not watch.is_best(0.3)
    assert watch.over
    assert watch.best == 0.3


def test_the_rate_warms_up_and_stays_or_falls_to_a_tenth():
    assert [scheduled(1.0, step, 4) for step in (0, 1, 3, 4, 900)] == [0.25, 0.5, 1, 1, 1]
    falling = [scheduled(1.0, step, 4, 104) for step in range(105)]
    assert falling[:5] == [0.25, 0.5, 0.75, 1, 1]
    assert falling[4:] == sorted(falling[4:], reverse=True)
    assert falling[54] == pytest.approx(0.55)
    assert falling[104] == pytest.approx(0.1)
    assert scheduled(1.0, 0, 0) == 1


def spoilt(**names):
    torch.manual_seed(0)
    tower = CompactTower(8, CompactConfig(layers=1, heads=1, max_history_items=4, dropout=0.0), None, 4)
    histories = [np.array([0, 1, 2]), np.array([3, 2])]
    config = SequenceConfig(histories_per_step=2, epochs=1)
    trainer = CompactTrainer(tower, histories, np.ones(4), None, np.arange(4), config, **names)
    tower.id_embedding.weight.data[2] = float("nan")
    return trainer


def test_divergence_names_the_batch_and_spoils_no_weight():
    trainer = spoilt(item_ids=["a", "b", "c", "d"])
    before = {name: value.clone() for name, value in trainer.tower.state_dict().items()}
    with pytest.raises(
        DivergedError, match=r"nan at step 1, whose batch .* lower train\.compact\.learning_rate"
    ) as error:
        trainer.train_step()
    assert sorted(error.value.batch["histories"]) == [["a", "b", "c"], ["d", "c"]]
    assert error.value.batch["step"] == 1
    for name, value in trainer.tower.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def test_without_names_a_batch_that_diverged_is_told_by_its_rows():
    with pytest.raises(DivergedError) as error:
        spoilt().train_step()
    assert sorted(error.value.batch["histories"]) == [[0, 1, 2], [3, 2]]
