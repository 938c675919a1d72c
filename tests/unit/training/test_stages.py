"""The order of a training's stages, and what is refused before it starts."""

import pytest
from fakes import tiny_config

from pixrec.errors import ConfigError
from pixrec.training.stages import check_joint, plan, stage_facts, vocabulary


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


def test_it_is_for_the_compact_tower_on_whole_copies_alone():
    wanted = {"joint": {"epochs": 1}}
    check_joint(tiny_config())
    check_joint(tiny_config(model={"user_tower": "compact"}, train=wanted))
    with pytest.raises(ConfigError, match=r"model\.user_tower"):
        check_joint(tiny_config(train=wanted))
    with pytest.raises(ConfigError, match="fsdp2"):
        check_joint(tiny_config(model={"user_tower": "compact"}, train={"parallel": "fsdp2", **wanted}))
