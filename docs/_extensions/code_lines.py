"""Put each line of a code block into an element, so that CSS can indent it where it wraps."""

import re
from collections.abc import Iterator
from typing import Any

from pygments.formatters import HtmlFormatter
from sphinx.application import Sphinx
from sphinx.highlighting import PygmentsBridge


class LineFormatter(HtmlFormatter):
    """Pygments' formatter, with a `span.line` for each line, which knows its indentation."""

    def _format_lines(self, tokensource: Any) -> Iterator[tuple[int, str]]:
        for is_line, html in super()._format_lines(tokensource):
            text = re.sub("<[^>]*>", "", html)
            indent = len(text) - len(text.lstrip(" "))
            style = f' style="--indent: {indent}ch"' if indent else ""
            yield is_line, f'<span class="line"{style}>{html}</span>' if is_line else html


def setup(app: Sphinx) -> dict[str, Any]:
    """Use it for all code."""
    PygmentsBridge.html_formatter = LineFormatter
    return {"parallel_read_safe": True, "parallel_write_safe": True}
