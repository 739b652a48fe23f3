"""The first minutes on a card: `make card`, or `python -m bench.card`.

Stages of their own processes and time limits, most valuable first: smoke, tests, times, questions, memcheck, profile.
Each writes a line of JSON for everything it finds, at once, so that what is cut short leaves what it has. The files are
in the order in which they are read: `stages.py` runs the stages, `summary.py` makes one page of what they wrote.
"""
