"""Put each line of a code block into an element, so that CSS can indent where it wraps."""

from collections.abc import Iterator
from typing import Any

from pygments.formatters import HtmlFormatter
from sphinx.application import Sphinx
from sphinx.highlighting import PygmentsBridge


class LineFormatter(HtmlFormatter):
    """Pygments' formatter, with a `span.line` for each line."""

    def _format_lines(self, tokensource: Any) -> Iterator[tuple[int, str]]:
        for is_line, text in super()._format_lines(tokensource):
            yield is_line, f'<span class="line">{text}</span>' if is_line else text


def setup(app: Sphinx) -> dict[str, Any]:
    """Use it."""
    PygmentsBridge.html_formatter = LineFormatter
    return {"parallel_read_safe": True, "parallel_write_safe": True}
