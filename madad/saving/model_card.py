"""What a saved model was made from and is for: read by people, and by ``madad predict`` before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from madad._runtime.version import __version__
from madad.mri import HealthyIntensities, VolumePreprocessor, VolumeSlicer

RESEARCH_ONLY = "For research use only. Not a medical device; no diagnosis or treatment may rest on it."


@dataclass
class ModelCard:
    """How a model's images were made, what it was trained on, and how well it does.

    Attributes
    ----------
    contrasts : tuple of str
        The model's channels in their order, such as ("T1",). Empty: not known, since arrays were given to
        ``fit``.
    preprocessor : VolumePreprocessor or None
        How scans were prepared, and are to be. None = not known.
    slicer : VolumeSlicer or None
        How slices were cut from volumes; a fitted one. None = not known.
    aggregation : dict
        ``smoothing_mm``, ``median_slices``, ``min_volume_ml`` of `madad.volumes.predict_volume`.
    volume_threshold, volume_offset : float or None
        Thresholds of maps, 0..1, and of scores of volumes, from held-out healthy ones. None = not measured.
    intensity_thresholds : dict of str to float
        Thresholds of plain intensity, from the same held-out slices: what a map is to be compared with.
    data, metrics : dict
        What the model was trained on, and what was measured of it: values that JSON holds, by name.
    healthy : dict of str to HealthyIntensities
        Intensities of the healthy scans, by contrast.
    version : str
        The madad that made the model. Default: this one.
    """

    contrasts: tuple[str, ...] = ()
    preprocessor: VolumePreprocessor | None = None
    slicer: VolumeSlicer | None = None
    aggregation: dict[str, Any] = field(default_factory=dict)
    volume_threshold: float | None = None
    volume_offset: float | None = None
    intensity_thresholds: dict[str, float] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    healthy: dict[str, HealthyIntensities] = field(default_factory=dict)
    version: str = __version__

    @property
    def preprocessing(self) -> dict:
        """The preprocessor's parameters, as `madad.volumes.bids_derivative.Derivative.start` keeps them."""
        return {} if self.preprocessor is None else preprocessing_of(self.preprocessor)

    def to_json(self) -> dict:
        """All but ``healthy``, as values that JSON holds."""
        slicer = self.slicer
        return {
            "version": self.version,
            "contrasts": list(self.contrasts),
            "preprocessing": self.preprocessing or None,
            "slices": None
            if slicer is None
            else {
                "plane": slicer.plane,
                "spacing_mm": list(slicer.spacing_mm_),
                "slice_mm": slicer.slice_mm,
                "range_mm": None if slicer.range_mm is None else list(slicer.range_mm),
                "shape": list(slicer.shape_),
            },
            "aggregation": self.aggregation,
            "volume_threshold": self.volume_threshold,
            "volume_offset": self.volume_offset,
            "intensity_thresholds": self.intensity_thresholds,
            "data": self.data,
            "metrics": self.metrics,
            "use": RESEARCH_ONLY,
        }

    def to_tensors(self) -> dict[str, np.ndarray]:
        """``healthy`` as arrays by name, for a tensor file."""
        return {
            f"{contrast}.{name}": value
            for contrast, intensities in self.healthy.items()
            for name, value in intensities.to_arrays().items()
        }

    @classmethod
    def from_json(cls, content: dict, tensors: Mapping[str, np.ndarray] | None = None) -> ModelCard:
        """The card that was written.

        Parameters
        ----------
        content : dict
            What `to_json` gave.
        tensors : dict of str to ndarray, or None
            What `to_tensors` gave. None = there was nothing.

        Raises
        ------
        ValueError
            If something is missing or of another kind.
        """
        try:
            preprocessing, slices = content["preprocessing"], content["slices"]
            return cls(
                contrasts=tuple(content["contrasts"]),
                preprocessor=None if preprocessing is None else VolumePreprocessor(**preprocessing),
                slicer=None if slices is None else _slicer(slices),
                aggregation=dict(content["aggregation"]),
                volume_threshold=_number(content["volume_threshold"]),
                volume_offset=_number(content["volume_offset"]),
                intensity_thresholds=dict(content["intensity_thresholds"]),
                data=dict(content["data"]),
                metrics=dict(content["metrics"]),
                healthy=_healthy(tensors or {}),
                version=str(content.get("version", __version__)),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"card.json must hold what was written beside the model, got parts that do not fit "
                f"({type(error).__name__}: {error}). Save the model again."
            ) from error

    def to_markdown(self, name: str, facts: dict[str, Any]) -> str:
        """The card as people read it.

        Parameters
        ----------
        name : str
            What the model is called, as in its heading.
        facts : dict
            What the model itself knows: class, preset, thresholds.

        Returns
        -------
        str
            Markdown.
        """
        unknown = "Not known: arrays were given to `fit`. Images must be prepared as those were."
        content, items = self.to_json(), partial(listing, bullet="- ")
        steps = content["preprocessing"]
        sections = {
            "Model": items(facts),
            "Use": f"{RESEARCH_ONLY} Predictions are differences to healthy brains as in the training data, "
            "of any cause: disease, age, scanner, motion, poor preprocessing.",
            "Data": items({"contrasts": ", ".join(self.contrasts), **self.data} if self.data else {})
            or unknown,
            "Preprocessing": unknown if steps is None else items(steps),
            "Slices": unknown if content["slices"] is None else items(content["slices"]),
            "Volumes": items(
                self.aggregation | {"threshold": self.volume_threshold, "offset": self.volume_offset}
                if self.slicer is not None
                else {}
            )
            or "Calibrated for single slices.",
            "Metrics": items(self.metrics) or "None measured. Run `madad evaluate` on patients with masks.",
            "Limits": "- Only what was seen in training counts as healthy: ages, scanners and sequences that "
            "were not in it may look anomalous.\n- Thresholds come from held-out healthy scans of the same "
            "cohort; in another one they may call more or less anomalous.\n- What was cut off by the range "
            "of the slices is not judged.",
        }
        body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
        return f"# {name}\n\nA model of madad {self.version}.\n\n{body}\n"


def preprocessing_of(preprocessor: VolumePreprocessor) -> dict:
    """What the results of ``preprocessor`` depend on, as values that JSON holds."""
    return preprocessor.get_params(deep=False)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _healthy(tensors: Mapping[str, np.ndarray]) -> dict[str, HealthyIntensities]:
    by_contrast: dict[str, dict[str, np.ndarray]] = {}
    for name, value in tensors.items():
        contrast, _, array = name.rpartition(".")
        by_contrast.setdefault(contrast, {})[array] = value
    return {name: HealthyIntensities.from_arrays(arrays) for name, arrays in by_contrast.items()}


def _slicer(slices: dict) -> VolumeSlicer:
    """A fitted slicer from its parameters."""
    row_mm, column_mm = slices["spacing_mm"]
    slicer = VolumeSlicer(
        slices["plane"],
        spacing_mm=row_mm if row_mm == column_mm else None,
        slice_mm=slices["slice_mm"],
        range_mm=None if slices["range_mm"] is None else tuple(slices["range_mm"]),
        shape=tuple(slices["shape"]),
    )
    slicer.shape_, slicer.spacing_mm_ = slicer.shape, (row_mm, column_mm)
    return slicer


def listing(facts: dict[str, Any], *, bullet: str = "", indent: str = "") -> str:
    """Lay out facts as ``name: value`` lines, those of a dict within below its name.

    Parameters
    ----------
    facts : dict
        Values by name; dicts may nest.
    bullet : str, default=""
        Text before each name.
    indent : str, default=""
        Blanks before each line.

    Returns
    -------
    str
        The lines.
    """
    lines = []
    for name, value in facts.items():
        if isinstance(value, dict):
            lines += [f"{indent}{bullet}{name}:", listing(value, bullet=bullet, indent=indent + "  ")]
        else:
            shown = f"{value:.6g}" if isinstance(value, float) else value
            lines.append(f"{indent}{bullet}{name}: {shown}")
    return "\n".join(lines)
