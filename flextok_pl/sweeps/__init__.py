"""Hyper-parameter sweeps: each trial is a `flextok fit` of its own, Optuna says which, and a launcher runs them."""
