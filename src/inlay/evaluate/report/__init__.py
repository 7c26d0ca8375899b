"""The report of a run: one HTML page that needs no other file and no network."""

from inlay.evaluate.report.page import report_page, write_report

__all__ = ["report_page", "write_report"]
