"""`trimtab classifiers`: the group; the commands are in files of their own."""

from __future__ import annotations

import click

from trimtab.ui.commands import (
    classifier_calibrate,
    classifier_files,
    classifier_look,
    classifier_train,
)
from trimtab.ui.help_page import HelpfulGroup


@click.group(
    cls=HelpfulGroup,
    examples=(
        "trimtab classifiers train --texts tones.jsonl --id tone",
        "trimtab classifiers calibrate tone",
        "trimtab classifiers list",
        "trimtab classifiers show tone",
        "trimtab classifiers eval tone --texts other_tones.jsonl",
    ),
)
def classifiers() -> None:
    """Train, look at, measure and share classifiers: what guidance follows, what probes read."""


for _command in (
    classifier_train.train,
    classifier_calibrate.calibrate,
    classifier_look.list_,
    classifier_look.show,
    classifier_train.eval_,
    classifier_files.export,
    classifier_files.import_,
    classifier_files.delete,
):
    classifiers.add_command(_command)
