"""`python -m tests.contract`: replay the recordings against the simulated Ollama and print what was compared."""

from __future__ import annotations

import logging
import sys
from collections import Counter

from tests.contract.replay import HEAD, NOT_COMPARED, TYPE_ONLY, everything


def main() -> int:
    """Print one row a scenario; return 1 where anything differs or was left out."""
    logging.disable(logging.WARNING)  # a port that is none is one of the recorded cases
    tallies = everything()
    print(HEAD)
    for tally in tallies:
        print(tally.line())
    sums = [sum(getattr(tally, name) for tally in tallies) for name in ("requests", "exact", "near", "typed")]
    ignored: Counter[str] = sum((tally.ignored for tally in tallies), Counter())
    problems = [problem for tally in tallies for problem in tally.problems]
    print(f"{'all':<36}{sums[0]:8} {sums[1]:6} {sums[2]:6} {sums[3]:6} {ignored.total():8} {len(problems):9}")
    print("\nnear: moments within some seconds, load or no load, order of events")
    print("typed, presence and type only:", *(f"\n  {name}: {reason}" for name, reason in TYPE_ONLY.items()))
    print("ignored:", *(f"\n  {count:5}  {reason}" for reason, count in ignored.most_common()))
    unused = set(NOT_COMPARED.values()) - set(ignored)
    problems += [f"the ignore list names what no recording holds: {reason}" for reason in sorted(unused)]
    print(*(f"\n{problem}" for problem in problems), sep="")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
