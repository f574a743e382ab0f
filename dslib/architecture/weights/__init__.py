"""Weights of published models in our decoders; in reading order: config, checkpoint, pretrained, twin."""
