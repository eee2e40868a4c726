"""Models on disk: JSON and safetensors in a folder, with a card that people read.

What a folder holds, in format 2:

======================= =====================================================================================
file                    content
======================= =====================================================================================
config.json             ``format`` ("madad"), ``format_version`` (2), the detector's ``class``, ``parameters``
                        and plain ``fitted`` attributes; which parts are ``shared`` with other detectors; of
                        each part what it says of itself
calibration.json        thresholds, and the parameters of the maps that they belong to
autoencoder.safetensors weights of the first stage, shift and scale of its latents
denoiser.safetensors    weights of the second stage; other detectors have files of other parts
card.json               how the images were made, what the model was trained on, what was measured
healthy.safetensors     intensities of the healthy scans, where the card has any
README.md               the card for people
======================= =====================================================================================

A network alone, as ``madad convert`` writes it, has ``config.json`` and its own tensors. Folders of format 1
are read too; ``save`` always writes format 2. No file holds code: what it names is built only if
`madad.saving.json_values.PARTS` lists it.
"""

from madad.saving.model_card import ModelCard
from madad.saving.saved_detector import load_card, save_network

__all__ = ["ModelCard", "load_card", "save_network"]
