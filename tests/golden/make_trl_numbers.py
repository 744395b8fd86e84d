"""Losses, gradients and advantages by TRL's own trainers, on the numbers that tests/test_methods.py repeats.

    pip install trl==1.16.0 torch==2.13.0 transformers==5.12.1    (an environment of their own)
    python tests/golden/make_trl_numbers.py

The trainers' `_compute_loss` runs unmodified on log-probs that a stand-in for the model returns, so that no weights are
needed.
"""

import json
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer

LOGP = [[-1.0, -0.2, -3.0, -0.7], [-0.5, -2.0, -0.1, -9.0], [-4.0, -0.3, -1.5, -2.5]]
OLD = [[-1.2, -0.1, -2.0, -0.7], [-0.4, -2.6, -0.1, -1.0], [-3.0, -0.9, -1.5, -2.0]]
REF = [[-1.1, -0.3, -2.5, -1.0], [-0.9, -2.2, -0.2, -1.0], [-3.5, -0.5, -1.0, -2.2]]
MASK = [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
ADVANTAGES = [0.8, -0.6, -0.2]


def grpo(loss_type: str, beta: float):
    """(loss, d loss / d log-probs) with clips 0.2 and 0.28."""
    logp = torch.tensor(LOGP, requires_grad=True)
    trainer = MagicMock()
    trainer.configure_mock(
        loss_type=loss_type, beta=beta, epsilon_low=0.2, epsilon_high=0.28, importance_sampling_level="token",
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False, max_completion_length=4,
        aux_loss_enabled=False, _entropy_bonus_enabled=False, current_gradient_accumulation_steps=1,
    )  # fmt: skip
    trainer.args = SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1)
    trainer.accelerator.num_processes = 1
    trainer.accelerator.gather = lambda x: x
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (logp, torch.zeros(3, 4), None)
    ids, mask = torch.ones(3, 4, dtype=torch.long), torch.tensor(MASK)
    inputs = {
        "prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": mask,
        "advantages": torch.tensor(ADVANTAGES), "old_per_token_logps": torch.tensor(OLD),
        "ref_per_token_logps": torch.tensor(REF), "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    return loss.item(), logp.grad.tolist()


def dpo(beta: float):
    """(loss, d loss / d log-probs) of one pair: the first two rows of LOGP against those of REF."""
    mask = torch.tensor(MASK[:2])
    logp = torch.tensor(LOGP[:2], requires_grad=True)
    trainer = MagicMock()
    trainer.configure_mock(
        loss_types=["sigmoid"], loss_weights=[1.0], beta=beta, f_divergence_type="reverse_kl", ld_alpha=None,
        precompute_ref_logps=False, aux_loss_enabled=False, use_weighting=False, label_smoothing=0.0,
    )  # fmt: skip
    trainer.accelerator.gather_for_metrics = trainer.accelerator.gather = lambda x: x
    trainer.accelerator.device = "cpu"
    unused = torch.zeros(2, 4)  # that only metrics are made of
    rest = {"entropy": unused, "mean_logits": unused, "is_top1": unused.bool()}
    policy = lambda **k: SimpleNamespace(log_probs=logp * mask, **rest)
    trainer.ref_model = lambda **k: SimpleNamespace(log_probs=torch.tensor(REF[:2]) * mask)
    completion_mask = torch.cat([torch.zeros(2, 1, dtype=torch.long), mask], 1)
    inputs = {"input_ids": torch.ones(2, 5, dtype=torch.long), "completion_mask": completion_mask,
              "attention_mask": torch.ones(2, 5, dtype=torch.long)}  # fmt: skip
    loss = DPOTrainer._compute_loss(trainer, policy, inputs, False)
    loss.backward()
    return loss.item(), logp.grad.tolist()


if __name__ == "__main__":
    for name, value in {
        "dr_grpo": grpo("dr_grpo", 0.0), "dr_grpo with beta 0.05": grpo("dr_grpo", 0.05), "dapo": grpo("dapo", 0.0),
        "dpo": dpo(0.1),
    }.items():  # fmt: skip
        print(name, json.dumps(value))
