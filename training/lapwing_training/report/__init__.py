"""What a fit found, for people: Markdown and one offline HTML page. Computes nothing.

`sections` says what stands in a report, in `blocks` of plain text; `markdown` and `html` each know one markup.
"""

from __future__ import annotations

from lapwing_training.report.documents import (
    html_report,
    html_transfer_report,
    model_card,
    training_report,
    transfer_report,
)
from lapwing_training.report.markdown import comparison_table
from lapwing_training.report.words import interval, number, title

__all__ = [
    "comparison_table",
    "html_report",
    "html_transfer_report",
    "interval",
    "model_card",
    "number",
    "title",
    "training_report",
    "transfer_report",
]
