"""Feature extractors, distances, pixel and token statistics, and reports of them."""
