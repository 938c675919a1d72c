"""metrics.json as a page to read: one HTML file that needs nothing else, and a table for the terminal.

`page` puts it together, `plots` places marks, `words` says it in sentences, `pictures` shows users and items.
"""

from pixrec.report.page import PAGE, write_report
from pixrec.report.pictures import Example, Grid, choose_examples, choose_grids
from pixrec.report.words import format_table, notes

__all__ = ["PAGE", "Example", "Grid", "choose_examples", "choose_grids", "format_table", "notes", "write_report"]
