"""Lets the CUDA build of torchvision be imported with a CPU build of torch.

Python runs this module at its start, since tools/serve_sglang.sh puts its folder on PYTHONPATH. The published
torchvision is built for CUDA, so its library does not load with a CPU torch. Two operators are then not declared, and
importing torchvision fails. This module declares them before torchvision is imported.
"""

import sys

DECLARATION = "(Tensor boxes, Tensor scores, float threshold) -> Tensor"


class _BeforeTorchvision:
    """An import finder that declares the operators before torchvision is imported, and finds no module itself."""

    library = None  # kept, since its declarations end with the object

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "torchvision" and cls.library is None:
            from torch.library import Library

            cls.library = Library("torchvision", "DEF")
            cls.library.define(f"nms{DECLARATION}")
            cls.library.define(f"qnms{DECLARATION}")
        return None


sys.meta_path.insert(0, _BeforeTorchvision)
