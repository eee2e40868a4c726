"""``madad preprocess``: from scans as they came to brains on one grid and one scale."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from madad.cli._cohort import (
    add_cohort_arguments,
    begin,
    for_each,
    raw_scans,
    share_of,
)
from madad.datasets import Scan
from madad.mri import PreprocessedVolume, VolumePreprocessor
from madad.mri.brain import METHODS
from madad.saving.model_card import preprocessing_of
from madad.volumes.bids_derivative import Derivative
from madad.volumes.preparation import bids_name, preprocess_scan
from madad.volumes.prepared_folder import (
    STEP,
    is_preprocessed_whole,
    write_preprocessed,
    write_preprocessing_table,
)


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add ``preprocess`` and its arguments.

    Parameters
    ----------
    commands : argparse subparsers
        The commands of ``madad``, to which it is added.
    """
    parser = commands.add_parser(
        "preprocess",
        help="find the brain, register it to the template, scale its intensities",
        description="IN is NIfTI files, a folder of them, a BIDS folder, or a table (.tsv, .csv) with the "
        "columns image and subject, and optionally session, contrast, brain_mask and lesion_mask. Images of "
        "one subject and session are contrasts of one brain and end on one grid. OUT becomes a BIDS "
        "derivative with a row for each image in preprocessing.tsv and for each failure in errors.tsv.",
    )
    parser.add_argument("inputs", type=Path, nargs="+", metavar="IN")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--contrast", help="of files whose names do not tell: T1, T2, PD, FLAIR, T1CE")
    parser.add_argument(
        "--brain",
        default="auto",
        choices=METHODS,
        help="how the brain is found where no mask is given; auto = the first of the next three that works",
    )
    parser.add_argument("--bias-field", action="store_true", help="correct the shading by N4")
    parser.add_argument("--no-template", action="store_true", help="stay on the scan's own grid")
    parser.add_argument("--center", default="median", choices=("median", "mode"), help="what sets the scale")
    add_cohort_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Preprocess what is not preprocessed yet.

    Parameters
    ----------
    options : argparse.Namespace
        The arguments that `add_command` added.

    Returns
    -------
    int
        The exit status. 0: done; 1: done, but some scans failed.
    """
    preprocessor = VolumePreprocessor(
        brain=options.brain,
        bias_field=options.bias_field,
        template=not options.no_template,
        center=options.center,
    )
    scans, source = raw_scans(options.inputs, options.contrast, options.out)
    folder = Derivative(options.out)
    begin(
        folder,
        options,
        "Preprocessed volumes",
        step=STEP,
        parameters=preprocessing_of(preprocessor),
        source=source,
    )

    tally = for_each(
        [(scan, partial(_prepare, preprocessor, scan)) for scan in share_of(scans, options)],
        partial(write_preprocessed, folder),
        is_done=lambda scan: is_preprocessed_whole(folder, scan, template=preprocessor.template),
        folder=folder,
        options=options,
        readers=options.readers or 0,
    )
    if not options.dry_run:
        folder.write_errors()
        write_preprocessing_table(folder)
    tally.report(options, options.out)
    return tally.status


def _prepare(preprocessor: VolumePreprocessor, scan: Scan) -> Mapping[str, PreprocessedVolume]:
    for contrast in scan.images:
        bids_name(contrast)  # before the work that it would be in vain for
    return preprocess_scan(preprocessor, scan)
