"""The environment of a process with stubs."""

import pytest

from shared.errors import UserError
from shared.rehearsal import build_stubs
from shared.rehearsal.machine import GPUS, RESERVE
from shared.rehearsal.reexecute import check_environment, with_stubs


def test_what_is_preloaded_comes_before_the_users() -> None:
    given = {"LD_PRELOAD": "/lib/libasan.so", "HOME": "/home/user", "OMP_NUM_THREADS": "3"}
    made = with_stubs(given, GPUS["l40s"])
    assert made["LD_PRELOAD"] == f"{build_stubs.stubs_folder() / build_stubs.RUNTIME}:/lib/libasan.so"
    assert made["LD_LIBRARY_PATH"] == str(build_stubs.stubs_folder())
    assert (made["HOME"], made["OMP_NUM_THREADS"]) == ("/home/user", "3")
    assert made["BATON_STUB_CAPABILITY"] == "89"
    assert int(made["BATON_STUB_MEMORY"]) - int(made["BATON_STUB_LIMIT"]) == RESERVE


def test_where_a_rehearsal_cannot_start() -> None:
    check_environment({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"})
    with pytest.raises(UserError, match="without torchrun"):
        check_environment({"RANK": "0"})
    with pytest.raises(UserError, match="unset PYTORCH_CUDA_ALLOC_CONF"):
        check_environment({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512,expandable_segments:True"})
