"""Whether a response follows instructions that a program can verify (IFEval, Zhou et al. 2023)."""

from hrm_text.eval.scoring.instructions.judging import Judged, judge
from hrm_text.eval.scoring.instructions.kinds import KINDS

__all__ = ["KINDS", "Judged", "judge"]
