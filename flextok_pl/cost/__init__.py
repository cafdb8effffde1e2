"""Estimates what a training costs: operations, memory and time, from configurations and a table of machines."""
