"""Reading reports in tests: nothing from outside, every element closed, every picture decodes."""

from __future__ import annotations

import base64
import io
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

from PIL import Image


class HtmlReader(HTMLParser):
    """Collect addresses and text, and check that every element is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href", "action", "data", "srcset")]
        if tag not in ("meta", "img", "br", "link", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def check_self_contained(html: str) -> HtmlReader:
    """Assert that a report needs no network and that its pictures decode; return what was read."""
    reader = HtmlReader(html)
    assert "<script" not in html and "@import" not in html and "url(" not in html.split("</style>")[0]
    assert '<meta name="viewport" content="width=device-width' in html
    assert "min-width: 600px" not in html
    for source in reader.sources:
        kind, content = source.split(",", 1)
        assert kind in ("data:image/png;base64", "data:image/svg+xml;base64"), source[:80]
        picture = base64.b64decode(content, validate=True)
        if "svg" in kind:
            root = ElementTree.fromstring(picture)
            outside = [v for e in root.iter() for k, v in e.items() if k.endswith("href") and not v.startswith("#")]
            assert not [v for v in outside if not v.startswith("data:")], outside
        else:
            Image.open(io.BytesIO(picture)).load()
    return reader
