"""Python reads this at its start, being on PYTHONPATH (tools/serve_sglang.sh). The published torchvision is built for
CUDA: its library does not load beside a CPU torch, so two operators that its Python side describes are never declared,
and it ends there. They are declared here, when torchvision is first looked for."""

import sys

DECLARATION = "(Tensor boxes, Tensor scores, float threshold) -> Tensor"


class _BeforeTorchvision:
    """A finder that finds nothing."""

    library = None  # kept: what it declares goes with it

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "torchvision" and cls.library is None:
            from torch.library import Library

            cls.library = Library("torchvision", "DEF")
            cls.library.define(f"nms{DECLARATION}")
            cls.library.define(f"qnms{DECLARATION}")
        return None


sys.meta_path.insert(0, _BeforeTorchvision)
