"""The order of a training's stages, and what is refused before it starts."""

import pytest
from fakes import tiny_config, tiny_model, write_model, write_prepared

from pixrec.errors import ArtifactError, ConfigError
from pixrec.training.stages import (
    begin_work,
    check_joint,
    check_resumable,
    check_start,
    model_facts,
    plan,
    stage_facts,
    training_key,
    vocabulary,
)


def test_the_compact_tower_follows_all_stages_and_both_together_come_last():
    config = tiny_config(
        model={"user_tower": "compact"},
        train={"stages": [{"name": "first", "data": ["/other"], "max_steps": 3}], "joint": {"epochs": 1}},
    )
    stages = plan("/data", config)
    assert [(s.part("both"), s.phase, s.data, s.folder("/work")) for s in stages] == [
        ("both_first", "interleaved", ["/other"], "/work/stages/first"),
        ("both", "interleaved", ["/data"], "/work"),
        ("both_compact", "compact", ["/data"], "/work/compact"),
        ("both_compact_joint", "joint", ["/data"], "/work/joint"),
    ]
    assert stages[0].config.train.max_steps == 3
    assert vocabulary(stages) == ["/data", "/other"]
    assert stage_facts(plan("/data", tiny_config(model={"user_tower": "compact"}))) == []


def test_a_run_goes_on_on_another_number_of_workers_and_with_no_other_setting(tmp_path):
    dataset = write_prepared(tmp_path / "data")
    out, train = str(tmp_path / "model"), {"histories_per_step": 6, "num_workers": 2}
    begin_work(out, dataset, tiny_config(train=train))
    for changed in ({"num_workers": 1}, {"num_workers": 3}, {"feed": "local", "threads_per_worker": 2}):
        check_resumable(out, dataset, tiny_config(train={**train, **changed}))
    for changed in ({"seed": 1}, {"histories_per_step": 7}, {"negatives": "local"}):
        with pytest.raises(ConfigError, match="differs from the unfinished run's"):
            check_resumable(out, dataset, tiny_config(train={**train, **changed}))
    local = {**train, "negatives": "local"}  # each worker has its own: another number of them, another loss
    begin_work(out, dataset, tiny_config(train=local))
    with pytest.raises(ConfigError, match="differs"):
        check_resumable(out, dataset, tiny_config(train={**local, "num_workers": 3}))


def test_it_is_for_the_compact_tower_on_whole_copies_alone():
    wanted = {"joint": {"epochs": 1}}
    check_joint(tiny_config())
    check_joint(tiny_config(model={"user_tower": "compact"}, train=wanted))
    with pytest.raises(ConfigError, match=r"model\.user_tower"):
        check_joint(tiny_config(train=wanted))
    with pytest.raises(ConfigError, match="fsdp2"):
        check_joint(tiny_config(model={"user_tower": "compact"}, train={"parallel": "fsdp2", **wanted}))


def test_a_training_that_goes_on_is_another_one_and_says_from_which_model(tmp_path):
    dataset, start = write_prepared(tmp_path / "data"), str(tmp_path / "model")
    with pytest.raises(ArtifactError, match="model holds no complete model; name another, or leave it out"):
        check_start(tiny_config(train={"start": start}))
    before = write_model(start, tiny_model())
    config = tiny_config(train={"start": start})
    check_start(config)
    assert model_facts(dataset, config)["start"] == {"uri": start, "fingerprint": before.info["fingerprint"]}
    assert "start" not in model_facts(dataset, tiny_config())
    assert training_key(dataset, config) != training_key(dataset, tiny_config())
    with pytest.raises(ConfigError, match=r"trained with another model\.embedding_width; set it alike"):
        check_start(tiny_config(model={"embedding_width": 8}, train={"start": start}))
    with pytest.raises(ArtifactError, match="knockouts/text_only holds no complete model"):
        check_start(tiny_config(train={"start": start, "knockouts": ["text"]}))
