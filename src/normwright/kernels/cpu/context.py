"""The one argument of every kernel: a table of 8-byte slots, integers, addresses and doubles.

`first, last, context` is what `torch_parallel_for` passes to its callback; everything else stands in this table.
"""

from __future__ import annotations

import struct

# sizes of the nest and of the parameters' broadcast; R rows of a narrow matrix are taken as one (columns only)
O, A, K, B, G, P, S, BY_A, R = range(9)
# how the work is cut: tasks in all, shared by workers; chunks of `a`, columns a task; which phase of two runs
TASKS, WORKERS, CHUNKS, COLUMNS, PHASE = range(9, 14)
# switches: statistics from x; subtract the mean; move the running statistics; parameter gradients wanted; results
# written past the cache
USE_BATCH, CENTER, UPDATE, WANT_PARAMETERS, STREAM = range(14, 19)
# addresses of tensors; 0 where there is none. EXTRA is the residual or, backward, the residual or the output
X, Y, WEIGHT, BIAS, EXTRA, MEAN, VAR, RUNNING_MEAN, RUNNING_VAR, DY, DWEIGHT, DBIAS, DEXTRA, SCRATCH, MASK = range(
    19, 34
)
# doubles
EPS, NEW_WEIGHT = 34, 35

pack = struct.Struct("34q2d").pack
