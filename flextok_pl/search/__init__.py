"""Search at test time for tokens whose images a verifier scores best.

The algorithms are those of SoTo (https://github.com/EPFL-VILAB/search-over-tokens).
"""
