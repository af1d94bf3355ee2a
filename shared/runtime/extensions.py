"""C++ functions that Megatron-Core compiles at first use, by torch.

torch guards a compilation by a file, which a killed process leaves: whoever needs the function next waits for it for ever. Here
ranks of one host wait by flock, which ends with a process, in a folder where nobody else compiles.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from shared.errors import UserError

_FOLDER = "baton"
_VARIABLE = "TORCH_EXTENSIONS_DIR"  # torch's


def compile_share_storage() -> None:
    """The function that recomputing `mla_up_proj` needs, once per host and version of torch.

    Raises:
        UserError: it cannot be compiled here.
    """
    from megatron.core.tensor_parallel import random
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get(_VARIABLE) or get_default_build_root())
    folder = root if root.name == _FOLDER else root / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    os.environ[_VARIABLE] = str(folder)
    with (folder / "flock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for left in folder.glob("*/lock"):  # by a killed process: nobody compiles while the flock is held
            left.unlink()
        try:
            random._get_share_storage()
        except (RuntimeError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"--recompute mla_up_proj: a C++ function of Megatron-Core cannot be compiled ({reason}); install g++ and ninja, "
                "or leave mla_up_proj out"
            ) from None
