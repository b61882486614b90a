"""What torchtitan imports and torch for CPUs has not. Imported before torchtitan."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

KERNELS = "torchtitan.models.moe.kernels"

if importlib.util.find_spec("triton") is None:
    # 2026-11: torchtitan 0.2.2 imports this module, which needs triton, for mixtures of experts, of which there are
    # none here; torch for CPUs comes without triton.
    standin = ModuleType(KERNELS)
    standin.generate_permute_indices = None  # type: ignore[attr-defined]
    sys.modules[KERNELS] = standin
