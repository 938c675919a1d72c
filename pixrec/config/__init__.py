"""The settings: one tree of frozen dataclasses, read from YAML, overridden, checked and written back.

Every section has a module of its own, in which a docstring under each field says what it means and in which unit. Knows
no files: YAML text in, YAML text out.
"""

from pixrec.config.demo import SyntheticConfig
from pixrec.config.embed import EmbedConfig
from pixrec.config.evaluate import EvaluateConfig, SasrecConfig, SasrecTowerConfig, SasrecTrainingConfig
from pixrec.config.job import JobConfig
from pixrec.config.model import CompactConfig, LoraConfig, Modalities, ModelConfig, TinyConfig
from pixrec.config.pipeline import PipelineConfig
from pixrec.config.prepare import PrepareConfig
from pixrec.config.serve import ServeConfig
from pixrec.config.train import JointConfig, SequenceConfig, StageConfig, TrainConfig
from pixrec.config.tree import SECRET_KEYS, Config, change_config, dump_config, load_config, to_dict

__all__ = [
    "SECRET_KEYS",
    "CompactConfig",
    "Config",
    "EmbedConfig",
    "EvaluateConfig",
    "JobConfig",
    "JointConfig",
    "LoraConfig",
    "Modalities",
    "ModelConfig",
    "PipelineConfig",
    "PrepareConfig",
    "SasrecConfig",
    "SasrecTowerConfig",
    "SasrecTrainingConfig",
    "SequenceConfig",
    "ServeConfig",
    "StageConfig",
    "SyntheticConfig",
    "TinyConfig",
    "TrainConfig",
    "change_config",
    "dump_config",
    "load_config",
    "to_dict",
]
