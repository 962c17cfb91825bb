"""Tables: rows are recipes over seeds."""
