"""`mrg-r1 score`: predicted and reference reports or labels enter, a score card leaves; two cards enter, their
differences leave.

`reading.py` knows the files, `card.py` what a card holds, `compare.py` when two may be compared, `tables.py` what is
printed. Needs neither policy nor DeepSpeed, and torch only where a labeler reads reports.
"""
