"""Tables: rows are recipes over seeds.

`plan` reads the table's file and knows every run, `run` starts those that are missing, `build` computes the cells with
their intervals, `render` writes the layouts.
"""
