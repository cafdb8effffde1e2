"""Hyper-parameter sweeps: Optuna chooses the trials, each is a `flextok fit`, and a launcher runs them."""
