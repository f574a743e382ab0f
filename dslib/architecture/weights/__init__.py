"""Weights of published models in our decoders. In reading order: ``config``, ``checkpoint``, ``pretrained``."""
