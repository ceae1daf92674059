"""The CPU and the GPU as the measurement sees them: a clock, the sizes of caches, what is to be told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from ..kernels.timed import by_clock, by_events
from ..lab.errors import UserError
from .others import LIBRARIES, installed


def second_level_cache() -> int:
    """Bytes of a core's second-level cache where Linux tells, else 1 MiB."""
    path = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
    if not path.exists():
        return 1 << 20
    text = path.read_text().strip()
    return int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]]


class Device(Protocol):
    """What the measurement knows of a device: its clock, its caches, who has kernels for it.

    Attributes:
        name: as in `--device`.
        place: where tensors and modules live.
        kernel: the kernel that is demanded unless another is.
        libraries: whether other libraries have kernels for it.
        sample_seconds: how long a sample is at least.
        l2_bytes: the cache that the inputs must exceed twice, or 0 if they need not rotate.
        tile_bytes: what one core, or multiprocessor, keeps at hand.
    """

    name: str
    place: str
    kernel: str | None
    libraries: bool
    sample_seconds: float
    l2_bytes: int
    tile_bytes: int

    def sample(self, call: Callable[[], object], inner: int) -> float:
        """Seconds a call, over `inner` of them."""
        ...

    def about(self) -> dict[str, Any]:
        """What a figure measured on it needs beside it."""
        ...


class Cpu(Device):
    """The CPU and the host's clock."""

    name = place = "cpu"
    kernel = None
    libraries = False
    # many clock ticks, many calls
    sample_seconds = 1e-3
    l2_bytes = 0

    def __init__(self) -> None:
        self.tile_bytes = second_level_cache()

    def sample(self, call: Callable[[], object], inner: int) -> float:
        return by_clock(call, inner)

    def about(self) -> dict[str, Any]:
        return {}


class Cuda(Device):
    """The current GPU and its events.

    Calls are issued one by one, as in eager training: a row shorter than the host needs to issue it shows the host.

    Raises: UserError if torch sees no GPU.
    """

    name = place = "cuda"
    kernel = "triton"
    libraries = True
    # estimated, not measured: of a shorter one the host's gaps, tens of microseconds, would be percents
    sample_seconds = 5e-3

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise UserError(
                f"--device cuda needs a GPU, and torch {torch.__version__} sees none. Install a CUDA build of torch on "
                "a machine with a GPU and its driver, or leave --device out to time the CPU."
            )
        self.properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.l2_bytes = self.properties.L2_cache_size
        registers = 4 * self.properties.regs_per_multiprocessor
        self.tile_bytes = registers + self.properties.shared_memory_per_multiprocessor

    def sample(self, call: Callable[[], object], inner: int) -> float:
        return by_events(call, inner)

    def about(self) -> dict[str, Any]:
        from torch.utils import collect_env

        return {
            "compute_capability": f"{self.properties.major}.{self.properties.minor}",
            "gpu": self.properties.name,
            "multiprocessors": self.properties.multi_processor_count,
            "l2_bytes": self.l2_bytes,
            "driver": collect_env.get_nvidia_driver_version(collect_env.run),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "triton": installed("triton"),
            "libraries": {name: installed(distribution) for name, (distribution, _) in LIBRARIES.items()},
        }


DEVICES: dict[str, Callable[[], Device]] = {"cpu": Cpu, "cuda": Cuda}
