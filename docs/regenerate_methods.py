"""Write the table of methods in docs/attribution.md from the registry, so that it cannot rot.

python docs/regenerate_methods.py            # writes the table
python docs/regenerate_methods.py --check    # exits with 1 if it is out of date
"""

from __future__ import annotations

import sys
from pathlib import Path

from trimtab.attribution.methods.registry import ALIASES, DEFAULT, describe, make
from trimtab.steering.registry import MethodCard

FILE = Path(__file__).resolve().parent / "attribution.md"
BEGIN, END = "<!-- methods -->\n", "<!-- /methods -->\n"
COST_AT = 32  # tokens of the prompt's own, for the column of costs


def table() -> str:
    """Return the table, a row a method."""
    rows = [
        f"| method | score of a token | options | rows at {COST_AT} tokens | source |",
        "|---|---|---|---|---|",
    ]
    rows += [_row(card) for card in describe()]
    return "\n".join(rows) + "\n"


def _row(card: MethodCard) -> str:
    others = [f"`{alias}`" for alias, name in sorted(ALIASES.items()) if name == card.name]
    name = f"`{card.name}`" + (f" ({', '.join(others)})" if others else "")
    if card.name == DEFAULT:
        name += ", the default"
    options = ", ".join(f"`{key}={value}`" for key, value in card.options.items()) or "none"
    cells = (name, card.summary, options, str(make(card.name).cost(COST_AT)), card.source)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def with_table(text: str) -> str:
    """Return the file's text with the table of today."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return head + BEGIN + table() + END + tail


def main() -> None:
    """Write the table, or compare it."""
    text = FILE.read_text(encoding="utf-8")
    if "--check" not in sys.argv[1:]:
        FILE.write_text(with_table(text), encoding="utf-8")
    elif with_table(text) != text:
        sys.exit("docs/attribution.md is out of date. Run: python docs/regenerate_methods.py")


if __name__ == "__main__":
    main()
