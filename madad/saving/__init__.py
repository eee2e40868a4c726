"""Models on disk: JSON and safetensors in a folder, with a card that people read."""

from madad.saving.model_card import ModelCard
from madad.saving.saved_detector import load_card, save_network

__all__ = ["ModelCard", "load_card", "save_network"]
