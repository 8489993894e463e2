# SPDX-License-Identifier: Apache-2.0
"""An explanation as one page of HTML that needs nothing else: no script, no font, no picture from elsewhere."""

from __future__ import annotations

import re
from importlib import resources

from .. import __version__
from . import terminal
from .explanation import Explanation


def page(explanation: Explanation) -> str:
    import jinja2
    from markupsafe import Markup, escape

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"size": terminal.size, "duration": terminal.duration, "saved": terminal.saved}
    # a line may end after the dots and underscores of a long name
    environment.filters["wbr"] = lambda name: Markup(re.sub(r"([._])", r"\1<wbr>", str(escape(name))))
    template = resources.files(__package__).joinpath("page.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(e=explanation, version=__version__)
