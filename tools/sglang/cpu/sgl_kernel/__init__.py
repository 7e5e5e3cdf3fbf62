"""In the place of sgl-kernel, which is published for CUDA alone. SGLang's CPU engine takes names from it when it is
imported, and calls none of them to decode a dense model with torch's own attention: each is there, and refuses."""


def __getattr__(name: str):
    if name.startswith("__"):  # asked for by the import system, which takes "no" for an answer
        raise AttributeError(name)

    def refuse(*_, **__):
        raise NotImplementedError(f"sgl_kernel.{name} is not built for this CPU")

    return refuse
