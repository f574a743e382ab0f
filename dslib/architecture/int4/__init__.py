"""Weights of four bits: how codes and scales are chosen (levels), layers of them (layers), put in place (replace)."""
