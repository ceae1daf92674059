"""What is wrong with the normalization in a model: checks that prove or measure a fault, and carry its mending."""

from .check import Check, Finding, all_checks
from .diagnose import diagnose
from .intended import intended
from .probe import CannotRun, Subject
from .report import NotRun, Report
from .watch import Log, WatchCallback, watch

__all__ = [
    "CannotRun",
    "Check",
    "Finding",
    "Log",
    "NotRun",
    "Report",
    "Subject",
    "WatchCallback",
    "all_checks",
    "diagnose",
    "intended",
    "watch",
]
