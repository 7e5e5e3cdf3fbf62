"""A stand-in for the package sgl-kernel, which is published for CUDA only.

SGLang's CPU engine imports names from it, but calls none of them when it decodes a dense model with torch's own
attention. So every name exists here, as a function that raises NotImplementedError.
"""


def __getattr__(name: str):
    if name.startswith("__"):  # the import system asks for such names, and they may be missing
        raise AttributeError(name)

    def refuse(*_, **__):
        raise NotImplementedError(f"sgl_kernel.{name} is not built for this CPU")

    return refuse
