"""The run to look at: one HTML file without any network, opened from disk (docs/page.md)."""

from mrg_r1.tracking.page.write import write_page

__all__ = ["write_page"]
