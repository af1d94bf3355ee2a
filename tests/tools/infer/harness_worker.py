"""lm-evaluation-harness's own command line, `harness_worker.py DIRECTORY WORDS...`, in DIRECTORY; a fork of the launcher."""

import os
import sys

os.chdir(sys.argv[1])
os.environ["HF_DATASETS_CACHE"] = f"{sys.argv[1]}/cache"
sys.argv[1:] = ["run", *sys.argv[2:]]

import datasets.config  # noqa: E402

datasets.config.HF_DATASETS_CACHE = f"{os.getcwd()}/cache"

from lm_eval.__main__ import cli_evaluate  # noqa: E402

cli_evaluate()
