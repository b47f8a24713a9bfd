"""The library that draws the charts, as it travels inside a page: compressed, and unpacked by the browser.

Plotly's Python package brings one bundle of its library, with every kind of chart, 4.8 MB; its smaller bundles are
published for npm alone. So the whole one is packed with gzip, which every current browser undoes by itself
(DecompressionStream); `page.js` does that.
"""

from __future__ import annotations

import base64
import functools
import gzip

from kvoffload.profiler.drawing.chart import plotly_javascript


@functools.cache
def packed_library() -> str:
    """The library, gzip and base64: the same text for the same release.

    Raises:
        ConfigError: plotly is not installed; says how to.
    """
    return base64.b64encode(gzip.compress(plotly_javascript().encode(), mtime=0)).decode()
