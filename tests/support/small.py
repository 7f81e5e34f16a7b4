"""Searches of seconds, with everything that a large one has."""

from __future__ import annotations

from typing import Any

#: Settings of `gpt-chars-1` whose least run is a few steps.
TINY = {"min_steps": 20, "warmup_steps": 5, "validation_samples": 64}
#: The smallest search that still has everything: three references and four candidates.
SMALL_SEARCH: dict[str, Any] = {
    "task": "text", "data": "texts", "train_flops": 1e10, "trials": 4, "references": 3, "seed": 1,
    "overrides": TINY,
}  # fmt: skip
