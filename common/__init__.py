"""The rooms behind `cts_common`, which is their map."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
