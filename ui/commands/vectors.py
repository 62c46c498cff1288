"""`trimtab vectors`: the group; each command is in a file of its own."""

from __future__ import annotations

import click

from trimtab.ui.commands import (
    vector_build,
    vector_compare,
    vector_files,
    vector_hub,
    vector_look,
)
from trimtab.ui.help_page import HelpfulGroup


@click.group(
    cls=HelpfulGroup,
    examples=(
        "trimtab vectors build --concept optimistic",
        "trimtab vectors list",
        "trimtab vectors show optimistic",
        'trimtab vectors apply optimistic -p "How will my first day go?" --scale 1 --scale -1',
    ),
)
def vectors() -> None:
    """Build, look at, try and share steering vectors."""


for _command in (
    vector_build.build,
    vector_build.concepts,
    vector_look.list_,
    vector_look.show,
    vector_look.apply,
    vector_compare.compare,
    vector_files.export,
    vector_files.import_,
    vector_files.delete,
    vector_hub.push,
    vector_hub.pull,
):
    vectors.add_command(_command)
