"""DMX: person re-identification models for cameras nobody labelled (DomainMix, BMVC 2021)."""

__version__ = "0.1.0"
