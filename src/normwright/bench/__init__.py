"""Every kernel on this machine: checked against float64, then timed against torch.

A row is a norm on a shape, memory layout and type, with its activation and residual, forward, backward or both. Its
layer is first compared with float64, and a wrong one is not timed. Then torch's modules, this package's layer, a plain
copy and, if asked for, others take turns in one process, so that whatever slows the machine slows all of them; the
ratio is the median over turns of (time of torch) / (time of ours). All sides have the same input, parameters, threads
and allocator. On a GPU times are of events, and the inputs rotate, so that none is found in cache.
"""

from .devices import Cpu, Cuda
from .measure import Result, bench, summary
from .row import Row, quick_rows, rows
from .terminal import command

__all__ = ["Cpu", "Cuda", "Result", "Row", "bench", "command", "quick_rows", "rows", "summary"]
