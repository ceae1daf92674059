"""Compiled kernels of these tests are kept with pytest's own cache.

A kernel's file is named by a digest of the kernels' sources, Numba, LLVM and the processor, so an old one is never
loaded by mistake, and one directory may serve every run and every worker: what one compiles the others load.
"""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def _kernel_cache(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NORMWRIGHT_CACHE", str(request.config.cache.mkdir("normwright")))
        yield
