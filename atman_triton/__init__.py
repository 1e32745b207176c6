"""Perturbation explanations, steering and training with per-key attention factors (AtMan)."""
