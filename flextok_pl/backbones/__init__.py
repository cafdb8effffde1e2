"""Pretrained networks that metrics, losses and teachers use: found in one way, and frozen."""
