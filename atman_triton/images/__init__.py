"""Pictures in prompts: reading them, and where each image token stands on its picture."""

from .geometry import Box
from .layout import ImageToken, cross_image_tokens, image_tokens
from .picture import readable

__all__ = ["Box", "ImageToken", "cross_image_tokens", "image_tokens", "readable"]
