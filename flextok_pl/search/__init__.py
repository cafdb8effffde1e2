"""Search at test time: candidates of tokens, a verifier that judges their images, and what is kept of them.

The algorithms are those of SoTo (https://github.com/EPFL-VILAB/search-over-tokens).
"""
