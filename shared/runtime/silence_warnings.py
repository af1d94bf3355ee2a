"""Silencing of warnings that a user cannot act on."""

from __future__ import annotations

import logging
import warnings


def silence() -> None:
    """Silence notices of Megatron-Core and torch about their own deprecated calls and absent extensions.

    Call it before importing them: the import already warns. Errors are exceptions, and are not silenced.
    """
    for category in (UserWarning, FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(torch|megatron)\b")
    warnings.filterwarnings("ignore", category=SyntaxWarning)
    logging.getLogger("megatron").setLevel(logging.ERROR)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
