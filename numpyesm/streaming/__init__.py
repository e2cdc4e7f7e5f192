"""Any number of sequences through the model: packed by length, long ones window by window, results one by one."""

from .stream import embed_iter

__all__ = ["embed_iter"]
