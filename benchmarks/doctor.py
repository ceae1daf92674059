"""What the doctor finds in the corpus of public faults: recall, and precision for each code.

`python benchmarks/doctor.py [--only TEXT] [--json]`

Each pair of `tests/doctor/corpus` is run once, the fault and its mended twin. Recall is the share of faults that are
reported under one of the codes that they may have. Precision of a code is the share of its findings, as an error or a
warning, that are the fault they were made in; what it says of a mended twin, or of another fault's program, is false.
Advice is counted apart: of a program with another fault it may be right.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "doctor"))
from corpus import Found, Pair, pairs


@dataclass
class Score:
    """The counts over the corpus.

    Arguments:
        faults: pairs by code, each under every code that it may be reported as.
        right: findings by code that are the fault.
        false: findings by code, errors and warnings, in a mended twin; `beside`, in a program with another fault.
        advice: advice by code in programs without that fault.
    """

    faults: Counter[str] = field(default_factory=Counter)
    right: Counter[str] = field(default_factory=Counter)
    false: Counter[str] = field(default_factory=Counter)
    beside: Counter[str] = field(default_factory=Counter)
    advice: Counter[str] = field(default_factory=Counter)


def measure(pair: Pair, score: Score) -> tuple[list[Found], list[Found]]:
    """Run a pair and count; returns what was found in the fault and, as errors or warnings, in its twin."""
    buggy, fixed = pair.buggy, pair.fixed
    loud = [f for f in fixed if f.severity != "advice" or f.code in pair.codes]
    score.faults.update(pair.codes)
    score.right.update({f.code for f in buggy} & pair.codes)
    others = [f for f in buggy if f.code not in pair.codes]
    score.beside.update({f.code for f in others if f.severity != "advice"})
    score.false.update({f.code for f in loud})
    score.advice.update({f.code for f in [*others, *fixed] if f.severity == "advice"})
    return buggy, loud


def precision(score: Score, *codes: str) -> float | None:
    """Of what was said, as errors and warnings or of the program's own fault, the share that is right; of all codes by
    default."""
    counts = (score.right, score.right + score.false + score.beside)
    right, said = (sum(count[code] for code in codes or count) for count in counts)
    return right / said if said else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="pairs whose name contains this")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    console, score = Console(), Score()
    missed, false, seconds = {}, {}, time.perf_counter()
    chosen = [pair for pair in pairs() if options.only in pair.name]
    for pair in chosen:
        buggy, loud = measure(pair, score)
        if not {f.code for f in buggy} & pair.codes:
            missed[pair.name] = f"one of {', '.join(sorted(pair.codes))}; found {sorted({f.code for f in buggy})}"
        if loud:
            false[pair.name] = [f"{f.code} {f.severity} at {f.where}: {f.message}" for f in loud]
    codes = sorted({*score.faults, *score.false, *score.beside, *score.advice})
    rows = {}
    for code in codes:
        rows[code] = {
            "faults": score.faults[code],
            "found": score.right[code],
            "false_in_twins": score.false[code],
            "in_other_faults": score.beside[code],
            "advice_elsewhere": score.advice[code],
            "precision": precision(score, code),
        }
    recall = 1 - len(missed) / len(chosen)
    silent = 1 - len(false) / len(chosen)
    if options.json:
        summary = {"pairs": len(chosen), "recall": recall, "silent_twins": silent, "precision": precision(score)}
        summary["codes"] = rows
        print(json.dumps({**summary, "missed": missed, "false": false}, ensure_ascii=False, indent=2))
        return
    table = Table()
    for column in ("code", "faults", "found", "false in twins", "in other faults", "advice elsewhere", "precision"):
        table.add_column(column, justify="left" if column == "code" else "right")
    for code, row in rows.items():
        *counts, share = row.values()
        table.add_row(code, *map(str, counts), "–" if share is None else f"{share:.2f}")
    console.print(table)
    for name, text in missed.items():
        console.print(f"missed  {name}: {text}", markup=False)
    for name, lines in false.items():
        for line in lines:
            console.print(f"false   {name}: {line}", markup=False)
    console.print(
        f"{len(chosen)} pairs in {time.perf_counter() - seconds:.0f} s: recall {recall:.3f}, mended twins silent "
        f"{silent:.3f}, precision over all codes {precision(score) or 0:.3f}"
    )


if __name__ == "__main__":
    main()
