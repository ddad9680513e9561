"""Code that a model wrote: what of a response is the program, and whether it passes its tests, in a sandbox."""

from hrm_text.eval.scoring.code.reading import programs_of
from hrm_text.eval.scoring.code.sandbox import Limits, Verdict, require_isolation, run_tests

__all__ = ["Limits", "Verdict", "programs_of", "require_isolation", "run_tests"]
