"""The reward service: a process of its own that labels reports, and how ranks talk to it."""
