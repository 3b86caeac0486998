"""The table of decisions lists every decision with its number and title."""

import os
import re
from pathlib import Path

TABLE = Path(os.environ.get("DECISIONS_TABLE", "docs/decisions/README.md"))


def test_the_table_has_a_row_for_each_decision_and_no_other() -> None:
    pages = sorted(TABLE.parent.glob("[0-9]*.md"))
    assert pages, f"no decisions beside {TABLE}"
    rows = []
    for page in pages:
        heading = re.match(r"# (\d+)\. (.+)\n", page.read_text(encoding="utf-8"))
        assert heading is not None, f"{page.name} does not begin with '# NUMBER. TITLE'"
        number, title = heading.groups()
        assert page.name.startswith(f"{int(number):04}-"), page.name
        rows.append(f"| {number} | [{title}]({page.name}) |")

    table = TABLE.read_text(encoding="utf-8").splitlines()

    assert [line for line in table if re.match(r"\| \d", line)] == rows
