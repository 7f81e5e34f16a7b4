"""The look that figures share: those of the dashboard and those of a study."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

#: Structured layers (in a study those of full rank that share nothing), and dense ones.
STRUCTURED, DENSE = "#3b82f6", "#d97706"
#: What runs are held against: a budget, the papers' numbers.
MARK = "#94a3b8"


def plain_text(text: str) -> str:
    """A text that plotly shows as it stands: it takes tags, and links, in texts for its own.

    >>> plain_text('<b>bold</b> & "so" on')
    '&lt;b&gt;bold&lt;/b&gt; &amp; "so" on'
    """
    return html.escape(text, quote=False)  # plotly knows no entity for quotes


def figure_layout(
    title: str, x: Mapping[str, Any], y: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
    """A plotly layout on the page's own background, light or dark; `more` is added on top."""
    axis = {"gridcolor": "rgba(128,128,128,.18)", "zeroline": False}
    return {
        "title": {"text": title, "font": {"size": 15}, "x": 0.01, "xanchor": "left"},
        "xaxis": {**axis, **x},
        "yaxis": {**axis, **y},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "color": "#64748b", "size": 12},
        "hovermode": "closest",
        **more,
    }


def log_axis(title: str) -> dict[str, Any]:
    """Of FLOPs or steps: many orders of magnitude."""
    return {"title": {"text": title}, "type": "log", "exponentformat": "power"}


def loss_axis(title: str) -> dict[str, Any]:
    """Of losses or their ratios: about one order of magnitude."""
    return {"title": {"text": title}, "type": "log", "nticks": 8, "tickformat": ".3~g"}
