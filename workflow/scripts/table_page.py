"""Show a Markdown table as a page of its own, for the report: `python table_page.py TABLE.md PAGE.html`."""

import re
import sys
from pathlib import Path

from markdown_it import MarkdownIt

from gdn_mup import errors
from gdn_mup.files import replacing

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{title}</title>
<style>
  body {{ font: 14px/1.5 sans-serif; margin: 1.5em; color: #222; background: #fff; }}
  table {{ border-collapse: collapse; border-top: 2px solid; border-bottom: 2px solid; }}
  thead {{ border-bottom: 1px solid; }}
  th, td {{ padding: 0.3em 0.6em; text-align: left; vertical-align: top; }}
  tbody tr:nth-child(even) {{ background: #f4f4f4; }}
</style>
{body}
</html>
"""

INTERVAL = re.compile(r"\S+ \[[^\]|]*\]")  # a number and the ends of its interval: +0.17 [−0.07, +0.40]


def main(markdown: str, page: str) -> None:
    """Write `page` from the file `markdown`; HTML in the Markdown is shown as text, intervals stay on one line."""
    text = re.sub(
        INTERVAL, lambda found: found[0].replace(" ", "\N{NO-BREAK SPACE}"), Path(markdown).read_text("utf-8")
    )
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    with replacing(Path(page)) as partial:
        partial.write_text(PAGE.format(title=Path(markdown).stem, body=body), "utf-8")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except OSError as error:
        errors.end(error)
