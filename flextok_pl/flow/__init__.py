"""Rectified flow: path, timestep and budget laws, solvers and guidance, as plain functions."""
