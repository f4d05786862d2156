"""A guard against waiting for the device."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operators that make the host wait for the device, or whose result's shape depends on data.
WAITING = {
    "_local_scalar_dense",
    "item",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "is_nonzero",
    "equal",
    "repeat_interleave",
}


class Waits(TorchDispatchMode):
    """Raises at an operator that would wait for a GPU, or that moves data between devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        bool_index = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in WAITING or bool_index:
            raise AssertionError(f"{func} waits for the device")
        found = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_") and len({x.device for x in (*args, found) if hasattr(x, "device")}) > 1:
            raise AssertionError(f"{func} moves data between devices")
        return found
