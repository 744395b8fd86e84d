"""Stands in for srun on two nodes, both here: starts the command of its line once a node, with the variables that Slurm
sets in a step, and ends as srun does, with the highest exit code. In the folder NODES it says each task's process."""

import os
import pathlib
import subprocess
import sys

command = [word for word in sys.argv[1:] if not word.startswith("--")]
tasks = []
for index in range(2):
    step = {
        "SLURM_STEP_NODELIST": "localhost,other", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_PROCID": str(index), "SLURM_LOCALID": "0",
    }  # fmt: skip
    log = open(pathlib.Path(os.environ["NODES"]) / f"node{index}.log", "a")  # noqa: SIM115 (the task writes there)
    task = subprocess.Popen(command, env={**os.environ, **step}, stdout=log, stderr=subprocess.STDOUT)
    (pathlib.Path(os.environ["NODES"]) / f"node{index}.pid").write_text(str(task.pid))
    tasks.append(task)
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
