"""Quick compilation in all tests, subprocesses too: their programs run for a second, LLVM's slow passes take longer.
And no test asks the network."""

import os

FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
os.environ["HF_HUB_OFFLINE"] = "1"
collect_ignore_glob = ["golden/*"]  # scripts that need transformers or TRL, in an environment of their own
