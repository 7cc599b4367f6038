"""What can be done before there is a group."""

from __future__ import annotations

import re

import torch

from deep_ep import environment, jit
from deep_ep.errors import EPEnvironmentError
from deep_ep.ops import all_kernels


def precompile(architecture: str | None = None) -> int:
    """Compile every kernel that buffers launch on GPUs, so that no rank waits for a compiler later. Takes no group.

    Kernels depend on nothing but the architecture: sizes, layouts and numbers of SMs are arguments. What is compiled
    goes to the cache (EP_JIT_CACHE_DIR), where all processes of this host find it; what is there already is left alone.

    Args:
        architecture: such as "sm_90a", for which no GPU is needed; None is that of the current GPU.

    Returns:
        the number of kernels.

    Raises:
        ValueError, TypeError: the architecture has another form.
        EPEnvironmentError: no architecture was given and there is no GPU; or no compiler was found.
        EPCompileError: a kernel does not compile.
    """
    if architecture is None:
        if not torch.cuda.is_available():
            raise EPEnvironmentError(
                "there is no GPU whose architecture precompile() could compile for; name one: precompile('sm_90a')"
            )
        architecture = "sm_{}{}a".format(*torch.cuda.get_device_capability())
    if not isinstance(architecture, str):
        raise TypeError(f"architecture must be a str such as 'sm_90a', but it is a {type(architecture).__name__}")
    if not re.fullmatch(r"sm_\d{2,3}a", architecture):
        raise ValueError(f"architecture must look like 'sm_90a' (Hopper) or 'sm_100a', but it is {architecture!r}")
    settings, kernels, target = environment.read(), all_kernels("cuda"), architecture
    return len(jit.precompile(kernels, lambda kernel: jit.default_toolchain(kernel, target, settings)))
