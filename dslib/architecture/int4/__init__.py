"""Weights of four bits: how codes and scales are chosen (levels), and layers made of them (layers)."""
