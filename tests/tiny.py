"""What end-to-end tests run on, in this process and in others: a small base of a few steps, short completions, and a
reward that such a base can win. Without it every advantage is 0, no weight moves, and nothing compared can differ."""

import dataclasses
import zlib

import numpy as np

import cts_common as cts
from common import base, evaluation
from common.model import ModelConfig
from common.replay import Quadruple
from common.tasks import TASKS

FLAGS = dict(
    task="fixtures_math", steps=3, prompts=4, group=4, max_new_tokens=48, wandb="disabled", save_every=2,
    temperature=0.7, truncated="keep",
)  # fmt: skip
FIT = 20  # updates of the critic, in scripts that have one


def flags(script) -> dict:
    """FLAGS and a short fit as far as the script has them."""
    names = {field.name for field in dataclasses.fields(script.Args)}
    return {k: v for k, v in {**FLAGS, "energy_fit": FIT}.items() if k in names}


@dataclasses.dataclass(frozen=True)
class TinyConfig(ModelConfig):
    """The nano model's architecture at a fraction of its size."""

    d_model: int = 64
    n_layers: int = 2
    head_dim: int = 16
    d_ff: int = 128


def parity_scores(texts: list[str], quads: list[Quadruple]) -> np.ndarray:
    """A 0/1 reward [B, G] of any text: the parity of its checksum."""
    return np.array([zlib.crc32(t.encode()) % 2 for t in texts], np.float32).reshape(len(quads), -1)


def install(setattr, setitem) -> None:
    """Put all of it in place by these two functions."""
    setitem(TASKS, "fixtures_math", dataclasses.replace(TASKS["fixtures_math"], base_steps=6, base_width=256))
    setattr(base, "ModelConfig", TinyConfig)
    for module in (cts, evaluation):
        setattr(module, "outcome_scores", parity_scores)
    setattr(evaluation, "PRECHECK_GROUPS", 8)
